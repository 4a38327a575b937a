"""Decoupled distillation against its definition in float64, with the label inside and outside of the kept ids."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from coldstill.trainer.loss_kernels.fused_head import Objective, loss_on_logits
from coldstill.trainer.losses.dkd import Dkd
from coldstill.trainer.losses.taid import ForwardKl
from tests import reference
from tests.trainer.losses.scenes import cut, known, scene, value_and_gradient


def labels_of(teacher: np.ndarray) -> list[int]:
    """The likeliest, one further down and one outside the top 7, in turn."""
    return [int(np.argsort(-row)[(0, 4, 12)[m % 3]]) for m, row in enumerate(teacher)]


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (1.0, 8.0), (0.0, 1.0), (1.0, 0.0)])
def test_equals_the_dense_loss_where_the_cache_holds_the_whole_vocabulary(alpha, beta):
    student, teacher, _ = scene()
    labels = labels_of(teacher)
    values, gradient = value_and_gradient(
        Dkd(alpha=alpha, beta=beta), student, cut(teacher, top_k=20, labels=labels, pads=1)
    )
    for m in range(6):
        check(values.loss[m], gradient[m], np.exp(teacher[m]), student[m], labels[m], alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (1.0, 8.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("pads", [0, 2])
def test_is_the_dense_loss_against_a_teacher_with_the_label_s_own_mass_and_the_student_s_tail(alpha, beta, pads):
    student, teacher, draws = scene()
    labels = labels_of(teacher)
    targets = cut(teacher, top_k=7, labels=labels, draws=draws, pads=pads)
    values, gradient = value_and_gradient(Dkd(alpha=alpha, beta=beta), student, targets)
    for m in range(6):
        p = reference.student_shaped_teacher(
            student[m], *known(targets, m), apart=(labels[m], float(teacher[m, labels[m]]))
        )
        check(values.loss[m], gradient[m], p, student[m], labels[m], alpha, beta)


def check(
    value: torch.Tensor,
    gradient: np.ndarray,
    p: np.ndarray,
    student: np.ndarray,
    label: int,
    alpha: float,
    beta: float,
) -> None:
    assert value.item() == pytest.approx(reference.dkd(p, reference.softmax(student), label, alpha, beta), abs=1e-11)
    wanted = reference.slope(lambda z: reference.dkd(p, reference.softmax(z), label, alpha, beta), student)
    np.testing.assert_allclose(gradient, wanted, atol=1e-8)


def test_gradcheck():
    student, teacher, _ = scene()
    targets, objective = cut(teacher[:3], top_k=7, labels=labels_of(teacher)[:3], pads=1), Objective(Dkd())
    leaf = torch.tensor(student[:3], requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss_on_logits(z, targets, objective, t=0.4)[0], (leaf,))


def test_with_the_weight_of_the_others_it_is_forward_kl():
    student, teacher, _ = scene()
    for m, label in enumerate(labels_of(teacher)[:2]):
        targets = cut(teacher[m : m + 1], top_k=7, labels=[label])
        beta = 1 - float(np.exp(teacher[m, label]))
        values, gradient = value_and_gradient(Dkd(beta=beta), student[m : m + 1], targets)
        forward, wanted = value_and_gradient(ForwardKl(tail="bucket"), student[m : m + 1], targets)
        np.testing.assert_allclose(values.loss, forward.loss, atol=1e-12)
        np.testing.assert_allclose(gradient, wanted, atol=1e-12)


def test_a_position_s_value_does_not_depend_on_the_others():
    student, teacher, _ = scene()
    whole, _ = value_and_gradient(Dkd(), student, cut(teacher, top_k=7))
    labels = list(range(6))
    for m in range(6):
        alone = cut(teacher[m : m + 1], top_k=7, labels=labels[m : m + 1])
        values, _ = value_and_gradient(Dkd(), student[m : m + 1], alone)
        assert values.loss.item() == pytest.approx(whole.loss[m].item(), abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_where_the_label_is_all_of_the_tail_or_more_by_rounding(dtype):
    student, teacher, _ = scene()
    outside = [int(np.argsort(-row)[-1]) for row in teacher]
    targets = cut(teacher, top_k=7, labels=outside)
    for excess in (0.0, 1e-3, 2.0):
        rounded = replace(targets, label_logprob=targets.log_tail + excess)
        for scale in (1.0, 60.0):
            # The student's tail is its label too, to the last digit.
            logits = student.copy()
            logits[np.arange(6), outside] += scale
            logits = logits.astype(np.float32 if dtype == torch.float32 else np.float64)
            values, gradient = value_and_gradient(Dkd(), logits, rounded)
            assert values.loss.isfinite().all()
            assert np.isfinite(gradient).all()
            assert np.abs(gradient).max() < 3


def test_a_label_that_the_teacher_excludes_has_no_part_in_the_loss():
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    found, wanted = (
        value_and_gradient(Dkd(), student, replace(targets, label_logprob=torch.full((6,), logprob).double()))
        for logprob in (-math.inf, -50.0)
    )
    torch.testing.assert_close(found[0].loss, wanted[0].loss)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-12)
