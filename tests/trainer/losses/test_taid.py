"""TAID and forward KL from a cache, with draws and without, against slow float64 twins, and the laws they must obey."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coldstill.trainer.losses.taid import ForwardKl, Taid
from tests import reference
from tests.trainer.losses.scenes import TIMES, cut, known, log_softmax, outcomes, scene, value_and_gradient

TAILS = ("mixture", "bucket")


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("tail", TAILS)
def test_equals_dense_taid_where_the_cache_holds_the_whole_vocabulary(t, tail):
    student, teacher, _ = scene()
    values, gradient = value_and_gradient(Taid(tail=tail), student, cut(teacher, top_k=20), t)
    for m in range(6):
        target = reference.dense_taid_target(student[m], teacher[m], t)
        assert values.loss[m].item() == pytest.approx(reference.kl(target, reference.softmax(student[m])), abs=1e-12)
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("pads", [0, 3])
def test_equals_the_explicit_sparse_target_with_draws_repeats_and_pads(t, tail, pads):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws, pads=pads)
    values, gradient = value_and_gradient(Taid(tail=tail), student, targets, t)
    for m in range(6):
        facts, drawn = known(targets, m), draws[m] if tail == "mixture" else []
        target = reference.sparse_target(student[m], *facts, drawn, t)
        assert target.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)
        wanted = reference.sparse_value(student[m], *facts, drawn, t)
        assert values.loss[m].item() == pytest.approx(wanted, abs=1e-12)
        assert values.bucket_kl[m].item() == pytest.approx(reference.bucket_kl(student[m], *facts), abs=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_gradient_is_the_slope_of_the_value_with_the_target_fixed(t):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    _, gradient = value_and_gradient(Taid(), student, targets, t)
    for m in range(6):
        facts = known(targets, m)
        wanted = reference.slope(
            lambda z, m=m, facts=facts: reference.sparse_value(z, *facts, draws[m], t, fixed_at=student[m]), student[m]
        )
        np.testing.assert_allclose(gradient[m], wanted, atol=1e-8)


@pytest.mark.parametrize("t", TIMES)
def test_weights_below_1_leave_the_rest_of_the_tail_to_the_student(t):
    student, teacher, draws = scene()
    weights = [[0.6 / len(drawn) for _ in drawn] for drawn in draws]
    targets = cut(teacher, top_k=7, draws=draws, weights=weights)
    _, gradient = value_and_gradient(Taid(), student, targets, t)
    for m in range(6):
        facts = known(targets, m)
        shares = [reference.sparse_target(student[m], *facts, drawn, t) for drawn in (draws[m], [])]
        target = 0.6 * shares[0] + 0.4 * shares[1]
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)


def test_unequal_weights_of_the_draws_are_their_shares_of_the_tail():
    student, teacher, _ = scene()
    tail = np.argsort(-teacher[0])[7:]
    shares = np.exp(teacher[0][tail])
    targets = cut(teacher[:1], top_k=7, draws=[tail.tolist()], weights=[(shares / shares.sum()).tolist()])
    _, gradient = value_and_gradient(Taid(), student[:1], targets, 1.0)
    np.testing.assert_allclose(gradient[0], reference.gradient(student[0], np.exp(teacher[0])), atol=1e-12)


def test_expected_target_at_t_1_is_the_teacher_given_that_there_is_a_draw():
    random = np.random.default_rng(11)
    teacher, student = log_softmax(random.standard_normal((1, 6)))[0], random.standard_normal(6)
    every = outcomes(Taid(), student, teacher, top_k=2, count=3, t=1.0)
    assert every.chances.sum() == pytest.approx(1)
    chances = every.chances * (every.drawn > 0)
    np.testing.assert_allclose(chances @ every.targets / chances.sum(), np.exp(teacher), atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_expected_target_on_the_tail_mixes_both_shapes_by_t_and_the_chance_of_a_draw(t):
    random = np.random.default_rng(11)
    teacher, student = log_softmax(random.standard_normal((1, 6)))[0], random.standard_normal(6)
    facts = known(cut(teacher[None], top_k=2), 0)
    every = outcomes(Taid(), student, teacher, top_k=2, count=3, t=t)
    tail = [v for v in range(6) if v not in facts.ids]
    of_student, of_teacher = (it[tail] / it[tail].sum() for it in (reference.softmax(student), np.exp(teacher)))
    share = t * (1 - (1 - np.exp(facts.log_tail)) ** 3)
    bucket = reference.sparse_target(student, *facts, [], t)
    wanted = bucket[tail].sum() * ((1 - share) * of_student + share * of_teacher)
    np.testing.assert_allclose((every.chances @ every.targets)[tail], wanted, atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_a_student_equal_to_the_teacher_has_no_expected_gradient(t):
    teacher = log_softmax(np.random.default_rng(12).standard_normal((1, 6)))[0]
    every = outcomes(Taid(), teacher + 0.7, teacher, top_k=2, count=3, t=t)
    np.testing.assert_allclose(every.chances @ every.targets, np.exp(teacher), atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_a_student_equal_to_the_teacher_has_no_gradient_without_draws(t):
    _, teacher, _ = scene()
    values, gradient = value_and_gradient(Taid(), teacher, cut(teacher, top_k=7), t)
    np.testing.assert_allclose(values.loss, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
def test_at_t_0_the_target_is_the_student_itself(tail):
    student, teacher, draws = scene()
    values, gradient = value_and_gradient(Taid(tail=tail), student, cut(teacher, top_k=7, draws=draws), 0.0)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)
    np.testing.assert_allclose(values.loss, 0, atol=1e-12)


def test_is_not_the_probability_mix_which_is_forward_kl_times_t():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=20)
    _, taid = value_and_gradient(Taid(), student, targets, 0.4)
    _, forward = value_and_gradient(ForwardKl(), student, targets, 0.4)
    mix = [
        reference.gradient(z, reference.probability_mix_target(z, p, 0.4))
        for z, p in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(mix, 0.4 * forward, atol=1e-12)
    assert np.abs(taid - mix).max() > 0.05


def test_small_t_walks_along_reverse_kl():
    student, teacher, _ = scene()
    _, gradient = value_and_gradient(Taid(), student, cut(teacher, top_k=20), 1e-6)
    for m in range(6):
        wanted = reference.slope(
            lambda z, m=m: reference.kl(reference.softmax(z), np.exp(teacher[m])), student[m], step=1e-4
        )
        np.testing.assert_allclose(gradient[m] / 1e-6, wanted, atol=1e-4)


@pytest.mark.parametrize("tail", TAILS)
def test_forward_kl_is_taid_at_t_1_whatever_t_is_given(tail):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    forward, forward_gradient = value_and_gradient(ForwardKl(tail=tail), student, targets, 0.3)
    taid, gradient = value_and_gradient(Taid(tail=tail), student, targets, 1.0)
    np.testing.assert_array_equal(forward.loss, taid.loss)
    np.testing.assert_array_equal(forward_gradient, gradient)


def test_the_target_is_held_fixed():
    student, teacher, _ = scene()
    _, gradient = value_and_gradient(Taid(), student, cut(teacher, top_k=20), 0.4)
    whole = torch.tensor(student, requires_grad=True)
    log_q = whole.log_softmax(1)
    target = (0.6 * log_q + 0.4 * torch.from_numpy(teacher)).softmax(1)
    (target * (target.log() - log_q)).sum().backward()
    assert whole.grad is not None
    assert np.abs(whole.grad.numpy() - gradient).max() > 0.05
