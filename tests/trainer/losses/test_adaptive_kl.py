"""Adaptive KL against its definition in float64, and against a published error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from coldstill.trainer.losses.adaptive_kl import AdaptiveKl
from coldstill.trainer.targets import SparseTargets
from tests import reference
from tests.trainer.losses.scenes import cut, known, log_softmax, scene, value_and_gradient


def grouped(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """The student over the kept ids and one symbol for the rest."""
    q = reference.softmax(logits)
    return np.array([*q[ids], max(1 - q[ids].sum(), 0)]) if len(ids) < q.size else q[ids]


def teacher_side(facts: tuple[list[int], list[float], float], vocabulary: int) -> np.ndarray:
    ids, logprobs, log_tail = facts
    return np.exp([*logprobs, log_tail]) if len(ids) < vocabulary else np.exp(logprobs)


@pytest.mark.parametrize("mu", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("top_k", [7, 20])
def test_is_forward_and_reverse_kl_weighed_by_the_gaps_with_the_weights_held_fixed(mu, top_k):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=top_k, pads=2)
    values, gradient = value_and_gradient(AdaptiveKl(mu=mu), student, targets)
    for m in range(6):
        facts = known(targets, m)
        p = teacher_side(facts, 20)
        # The tail comes last whatever its mass: as a group of ids it is no candidate for the head.
        share = share_with_tail_last(p, grouped(student[m], facts.ids), mu, has_tail=top_k < 20)

        def weighed(z: np.ndarray, p: np.ndarray = p, share: float = share, ids: list[int] = facts.ids) -> float:
            q = grouped(z, ids)
            return share * reference.kl(p, q) + (1 - share) * reference.kl(q, p)

        assert values.loss[m].item() == pytest.approx(weighed(student[m]), abs=1e-11)
        np.testing.assert_allclose(gradient[m], reference.slope(weighed, student[m]), atol=5e-9)


def share_with_tail_last(p: np.ndarray, q: np.ndarray, mu: float, *, has_tail: bool) -> float:
    if not has_tail:
        return reference.adaptive_kl_share(p, q, mu)
    head, mass = 0.0, 0.0
    for rank, v in enumerate(np.argsort(-p[:-1])):
        mass += p[v]
        head += abs(p[v] - q[v]) if rank == 0 or mass <= mu else 0.0
    return head / np.abs(p - q).sum()


def test_the_head_does_not_depend_on_the_order_of_the_kept_ids():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(targets, ids=targets.ids[:, order], logprobs=targets.logprobs[:, order])
    for mine, theirs in zip(of(student, targets), of(student, shuffled), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-14)


def of(student: np.ndarray, targets: SparseTargets) -> tuple[torch.Tensor, np.ndarray]:
    values, gradient = value_and_gradient(AdaptiveKl(), student, targets)
    return values.loss, gradient


def test_the_head_is_not_the_end_of_the_vocabulary():
    # The teacher's likeliest id is the first. A head marked in ascending order and applied to gaps in the order of the
    # vocabulary would be the last ids.
    teacher = log_softmax(np.array([[4.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    student = np.array([[-4.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    values, _ = value_and_gradient(AdaptiveKl(), student, cut(teacher, top_k=6))
    p, q = np.exp(teacher[0]), reference.softmax(student[0])
    forward, reverse = reference.kl(p, q), reference.kl(q, p)
    half = values.loss[0].item() - 0.5 * (forward + reverse)
    assert half == pytest.approx(0, abs=1e-12)  # The gap of the first id is half of all: they sum to 0 with a sign.
    misread = np.abs(p - q)[-2:].sum() / np.abs(p - q).sum()
    assert abs(misread * forward + (1 - misread) * reverse - values.loss[0].item()) > 0.1


def test_the_first_id_is_head_even_where_it_holds_more_than_mu():
    p, q = np.array([0.9, 0.06, 0.04]), np.array([0.5, 0.3, 0.2])
    values, _ = value_and_gradient(AdaptiveKl(mu=0.5), np.log(q)[None], cut(np.log(p)[None], top_k=3))
    assert values.loss.item() == pytest.approx(0.5 * (reference.kl(p, q) + reference.kl(q, p)))


def test_a_student_equal_to_the_teacher_has_nothing_to_learn():
    _, teacher, _ = scene()
    values, gradient = value_and_gradient(AdaptiveKl(), teacher, cut(teacher, top_k=7))
    np.testing.assert_allclose(values.loss, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
