"""What other tools make of a top-k, for comparison: renormalized and zero tails against their explicit targets."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.draws.comparison_losses import RenormalizedTaid, ZeroTailTaid
from coldstill.trainer.loss_kernels.fused_head import Objective
from coldstill.trainer.losses.taid import ForwardKl, Taid
from tests import reference
from tests.trainer.losses.scenes import TIMES, cut, known, scene, value_and_gradient


@pytest.mark.parametrize("t", TIMES)
def test_renormalized_is_taid_among_the_kept_ids_and_teaches_no_other(t):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7, pads=2)
    values, gradient = value_and_gradient(RenormalizedTaid(), student, targets, t)
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


@pytest.mark.parametrize("objective", [Objective(RenormalizedTaid()), Objective(ZeroTailTaid())])
def test_nothing_is_cut_off_where_the_cache_holds_the_whole_vocabulary(objective):
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=20)
    _, gradient = value_and_gradient(objective, student, targets, 0.4)
    np.testing.assert_allclose(gradient, value_and_gradient(Taid(), student, targets, 0.4)[1], atol=1e-12)


def test_none_of_them_is_the_teacher_s_loss():
    student, teacher, _ = scene()
    targets = cut(teacher, top_k=7)
    _, bucket = value_and_gradient(ForwardKl(tail="bucket"), student, targets)
    for objective in (
        Objective(RenormalizedTaid()),
        Objective(ZeroTailTaid()),
    ):
        assert np.abs(value_and_gradient(objective, student, targets)[1] - bucket).max() > 0.01
