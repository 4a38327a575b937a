"""What others make of a top-k, for comparison: renormalised, zero and uniform tails against their explicit targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coldstill.trainer.losses import Objective
from coldstill.trainer.losses.cross_entropy import CrossEntropy
from coldstill.trainer.losses.fused_head import Head, loss_on_hidden
from coldstill.trainer.losses.taid import AtTeacher, ForwardKl, Taid
from coldstill.trainer.losses.truncated import RenormalisedTaid, ZeroTailTaid
from coldstill.trainer.losses.uniform_tail import UniformTail, UniformTailObjective
from tests import reference
from tests.trainer.losses.scenes import TIMES, cut, known, scene, value_and_gradient


def uniform_teacher(ids: list[int], logprobs: list[float], log_tail: float, vocabulary: int) -> np.ndarray:
    """Log-probs `[V]` of the cache with its tail spread evenly."""
    log_p = np.full(vocabulary, log_tail - np.log(max(vocabulary - len(ids), 1)))
    log_p[ids] = logprobs
    return log_p


@pytest.mark.parametrize("t", TIMES)
def test_renormalised_is_taid_among_the_kept_ids_and_teaches_no_other(t):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7, pads=2)
    values, gradient = value_and_gradient(RenormalisedTaid(), student, targets, t)
    for m in range(6):
        ids, logprobs, _ = known(targets, m)
        target = reference.dense_taid_target(student[m][ids], np.array(logprobs), t)
        wanted = np.zeros(20)
        wanted[ids] = reference.gradient(student[m][ids], target)
        np.testing.assert_allclose(gradient[m], wanted, atol=1e-12)
        assert values.loss[m].item() == pytest.approx(
            reference.kl(target, reference.softmax(student[m][ids])), abs=1e-12
        )


@pytest.mark.parametrize("t", TIMES)
def test_a_zero_tail_pulls_the_student_s_tail_to_nothing_at_every_t(t):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7, pads=2)
    values, gradient = value_and_gradient(ZeroTailTaid(), student, targets, t)
    for m in range(6):
        ids, logprobs, _ = known(targets, m)
        target = np.zeros(20)
        target[ids] = reference.dense_taid_target(student[m][ids], np.array(logprobs), t)
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)
        assert values.loss[m].item() == pytest.approx(reference.kl(target, reference.softmax(student[m])), abs=1e-12)
        assert (np.delete(gradient[m], ids) > 0).all()


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("pads", [0, 2])
def test_a_uniform_tail_is_dense_taid_against_the_teacher_with_a_flat_tail(t, pads):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7, pads=pads)
    values, gradient = value_and_gradient(UniformTailObjective(UniformTail()), student, targets, t)
    for m in range(6):
        target = reference.dense_taid_target(student[m], uniform_teacher(*known(targets, m), 20), t)
        np.testing.assert_allclose(gradient[m], reference.gradient(student[m], target), atol=1e-12)
        assert values.loss[m].item() == pytest.approx(reference.kl(target, reference.softmax(student[m])), abs=1e-12)
        wanted = reference.bucket_kl(student[m], *known(targets, m))
        assert values.bucket_kl[m].item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("objective", [UniformTailObjective(UniformTail()), Objective(RenormalisedTaid())])
def test_nothing_is_cut_off_where_the_cache_holds_the_whole_vocabulary(objective):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=20)
    _, gradient = value_and_gradient(objective, student, targets, 0.4)
    np.testing.assert_allclose(gradient, value_and_gradient(Taid(), student, targets, 0.4)[1], atol=1e-12)


def test_the_uniform_tail_takes_a_share_of_cross_entropy():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    mixed, gradient = value_and_gradient(UniformTailObjective(UniformTail(), 0.25), student, targets, 0.4)
    alone, of_teacher = value_and_gradient(UniformTailObjective(UniformTail()), student, targets, 0.4)
    labels, of_labels = value_and_gradient(CrossEntropy(), student, targets)
    np.testing.assert_allclose(gradient, 0.75 * of_teacher + 0.25 * of_labels, atol=1e-14)
    np.testing.assert_allclose(mixed.loss, 0.75 * alone.loss + 0.25 * labels.loss, atol=1e-14)
    np.testing.assert_array_equal(mixed.distillation, alone.loss)


def test_the_uniform_tail_is_the_same_chunk_by_chunk_behind_a_head():
    student, teacher, _ = scene()
    targets, objective = cut(teacher, top_k=7), UniformTailObjective(UniformTail(), 0.25)
    hidden = torch.tensor(student, requires_grad=True)
    head = Head(weight=torch.eye(20, dtype=torch.float64), bias=None, token_count=20)
    total, values = loss_on_hidden(hidden, head, targets, objective, t=0.4, chunk_bytes=2 * 20 * 8)
    total.backward()
    wanted, gradient = value_and_gradient(objective, student, targets, 0.4)
    np.testing.assert_allclose(values.loss, wanted.loss, atol=1e-12)
    assert hidden.grad is not None
    np.testing.assert_allclose(hidden.grad, gradient, atol=1e-12)


def test_the_uniform_tail_refuses_to_be_guessed_from_a_view():
    student, teacher, _ = scene()
    with pytest.raises(TypeError, match="whole logits"):
        value_and_gradient(Objective(UniformTail()), student, cut(teacher, top_k=7))


@pytest.mark.parametrize(
    ("forward", "at_1"),
    [
        (Objective(AtTeacher(RenormalisedTaid())), Objective(RenormalisedTaid())),
        (Objective(AtTeacher(ZeroTailTaid())), Objective(ZeroTailTaid())),
        (UniformTailObjective(UniformTail(at_teacher=True)), UniformTailObjective(UniformTail())),
    ],
)
def test_forward_kl_is_each_of_them_held_at_t_1(forward, at_1):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    values, gradient = value_and_gradient(forward, student, targets, 0.3)
    wanted, slope = value_and_gradient(at_1, student, targets, 1.0)
    np.testing.assert_array_equal(values.loss, wanted.loss)
    np.testing.assert_array_equal(gradient, slope)


def test_none_of_them_is_the_teacher_s_loss():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    _, bucket = value_and_gradient(ForwardKl("bucket"), student, targets)
    for objective in (
        Objective(RenormalisedTaid()),
        Objective(ZeroTailTaid()),
        UniformTailObjective(UniformTail()),
    ):
        assert np.abs(value_and_gradient(objective, student, targets)[1] - bucket).max() > 0.01
