"""The tail's control variate: the same expectation, with less noise, and a limit on the ratio of one draw."""

from __future__ import annotations

import numpy as np
import pytest

from coldstill.trainer.losses.base import Loss
from coldstill.trainer.losses.taid import ForwardKl, Taid
from tests import reference
from tests.trainer.losses.scenes import TIMES, Outcomes, cut, known, log_softmax, outcomes, scene, value_and_gradient

CONTROLLED = Taid(tail="control_variate")


def near_pair() -> tuple[np.ndarray, np.ndarray]:
    """Student logits and teacher log-probs `[6]` whose tails differ by less than the limit everywhere."""
    random = np.random.default_rng(12)
    teacher = log_softmax(random.standard_normal((1, 6)))[0]
    return teacher + 0.4 * random.standard_normal(6), teacher


def moments(found: Outcomes) -> tuple[np.ndarray, float]:
    """Mean target `[V]` and total variance of the target, given that there is a draw."""
    some = found.drawn > 0
    chances = found.chances[some] / found.chances[some].sum()
    mean = chances @ found.targets[some]
    return mean, float(chances @ ((found.targets[some] - mean) ** 2).sum(1))


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_expected_target_is_that_of_the_mixture_and_its_noise_is_smaller(t: float, top_k: int) -> None:
    student, teacher = near_pair()
    mean, noise = moments(outcomes(CONTROLLED, student, teacher, top_k=top_k, count=4, t=t))
    wanted, before = moments(outcomes(Taid(), student, teacher, top_k=top_k, count=4, t=t))
    np.testing.assert_allclose(mean, wanted, atol=1e-12)
    assert noise < 0.5 * before or t == 0


@pytest.mark.parametrize("t", TIMES)
def test_the_target_is_the_formula_for_each_draw(t: float) -> None:
    """A share of .5 of `q' / p'`, at most 4, is taken off each draw's weight and given to the student's shape."""
    student, teacher, draws = scene()
    for m, drawn in enumerate(draws):
        student[m, drawn[:1]] += 5  # one draw of a position is beyond the limit
    targets = cut(teacher, top_k=7, draws=draws)
    _, gradient = value_and_gradient(CONTROLLED, student, targets, t)
    reached = 0
    for m in range(6):
        ids, logprobs, log_tail = known(targets, m)
        q, p = reference.softmax(student[m]), np.exp(teacher[m])
        tail = [v for v in range(20) if v not in ids]
        shape_q, shape_p = q / q[tail].sum(), p / p[tail].sum()
        bucket = reference.sparse_target(student[m], ids, logprobs, log_tail, [], t)
        mass = bucket[tail].sum()
        target = bucket.copy()
        for v in draws[m]:
            ratio = shape_q[v] / shape_p[v]
            reached += ratio > 4
            weight = t * mass * (1 - 0.5 * min(ratio, 4)) / len(draws[m])
            target[tail] -= weight * shape_q[tail]
            target[v] += weight
        np.testing.assert_allclose(gradient[m], q - target, atol=1e-12)
    assert reached > 0


@pytest.mark.parametrize("t", TIMES)
def test_the_value_is_that_of_the_mixture(t: float) -> None:
    """The adaptive schedule follows the value, and logs of two tails are compared."""
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    value, gradient = value_and_gradient(CONTROLLED, student, targets, t)
    wanted, of_mixture = value_and_gradient(Taid(), student, targets, t)
    np.testing.assert_allclose(np.asarray(value.loss), np.asarray(wanted.loss), atol=1e-12)
    assert np.abs(gradient - of_mixture).max() > 1e-3 or t == 0


def test_it_is_a_tail_of_forward_kl_too() -> None:
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    found: list[np.ndarray] = []
    losses: list[tuple[Loss, float]] = [(ForwardKl(tail="control_variate"), 0.3), (CONTROLLED, 1.0)]
    for loss, t in losses:
        values, gradient = value_and_gradient(loss, student, targets, t)
        found += [np.asarray(values.loss), gradient]
    np.testing.assert_allclose(found[0], found[2], atol=1e-13)
    np.testing.assert_allclose(found[1], found[3], atol=1e-13)
