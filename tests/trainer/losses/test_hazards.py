"""Every loss at numerical limits: a teacher whose kept ids hold all mass, a student whose tail underflows, pads,
nothing to learn from, half precision. The defects of other implementations are tests here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.draws.comparison_losses import RenormalizedTaid, ZeroTailTaid
from coldstill.trainer.loss_kernels.fused_head import Objective, loss_on_logits
from coldstill.trainer.losses.adaptive_kl import AdaptiveKl
from coldstill.trainer.losses.cross_entropy import CrossEntropy
from coldstill.trainer.losses.divergences import JensenShannon, ReverseKl, SkewForwardKl, SkewReverseKl, TotalVariation
from coldstill.trainer.losses.dkd import Dkd
from coldstill.trainer.losses.lightning_opd import LightningOpd
from coldstill.trainer.losses.taid import ForwardKl, MassCorrectedTaid, Taid
from coldstill.trainer.targets import SparseTargets
from tests import reference
from tests.trainer.losses.scenes import cut, known, log_softmax, scene, value_and_gradient


def every_loss() -> dict[str, Objective]:
    losses = {
        "taid": Taid(),
        "taid, bucket": Taid(tail="bucket"),
        "taid, mass_corrected": MassCorrectedTaid(),
        "taid, control_variate": Taid(tail="control_variate"),
        "taid, renormalized": RenormalizedTaid(),
        "taid, zero": ZeroTailTaid(),
        "forward_kl": ForwardKl(),
        "reverse_kl": ReverseKl(),
        "js": JensenShannon(),
        "tvd": TotalVariation(),
        "skew_forward_kl": SkewForwardKl(),
        "skew_reverse_kl": SkewReverseKl(),
        "adaptive_kl": AdaptiveKl(),
        "dkd": Dkd(),
        "lightning_opd": LightningOpd(),
        "cross_entropy": CrossEntropy(),
    }
    return {name: Objective(loss) for name, loss in losses.items()}


NAMES = list(every_loss())


def one_id_of_five(log_tail: float, label: int) -> SparseTargets:
    """A position that keeps id 2 with all the mass there is, padded once, without draws."""
    return SparseTargets(
        ids=torch.tensor([[2, 2]]),
        logprobs=torch.tensor([[0.0, -torch.inf]]),
        log_tail=torch.tensor([log_tail]),
        labels=torch.tensor([label]),
        label_logprob=torch.tensor([0.0 if label == 2 else -60.0]),
        draws=torch.zeros((1, 0), dtype=torch.int64),
        draw_weights=torch.zeros((1, 0)),
        draw_logprobs=torch.zeros((1, 0)),
        row=torch.zeros(1, dtype=torch.int64),
        position=torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("name", NAMES)
def test_finite_where_the_kept_ids_hold_all_the_teacher_s_mass_and_the_student_s_tail_underflows(name):
    # Two of the tools that keep a tail bucket take log(1 - sum) of this: -inf, and not a number in the gradient.
    for log_tail in (-60.0, -torch.inf):
        for label in (2, 0):
            for student_scale in (1.0, 1e4):
                for winner in (2, 0):
                    for t in (0.0, 0.1, 1.0):
                        logits = np.zeros((1, 5), np.float32)
                        logits[0, winner] = student_scale
                        values, gradient = value_and_gradient(
                            every_loss()[name], logits, one_id_of_five(log_tail, label), t
                        )
                        where = (log_tail, label, student_scale, winner, t)
                        assert values.loss.isfinite().all(), where
                        assert values.bucket_kl.isfinite().all(), where
                        assert np.isfinite(gradient).all(), where
                        assert abs(gradient.sum()) < 1e-3 * max(1, np.abs(gradient).max()), where


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cross_entropy"])
@pytest.mark.parametrize("scale", [1, 10, 40])
def test_float32_stays_close_to_float64_however_small_the_student_s_tail(name, scale):
    random = np.random.default_rng(5)
    teacher = log_softmax(6 * random.standard_normal((32, 300)))
    student = (scale * random.standard_normal((32, 300))).astype(np.float32)
    draws = [[int(v) for v in random.choice(np.argsort(-row)[16:], size=m % 4)] for m, row in enumerate(teacher)]
    exact = cut(teacher, top_k=16, draws=draws)
    single = dataclasses.replace(
        exact,
        **{
            it.name: getattr(exact, it.name).float()
            for it in dataclasses.fields(exact)
            if getattr(exact, it.name).dtype == torch.float64
        },
    )
    values, gradient = value_and_gradient(every_loss()[name], student, single, 0.4)
    wanted, wanted_gradient = value_and_gradient(every_loss()[name], student.astype(np.float64), exact, 0.4)
    assert values.loss.dtype == torch.float32
    np.testing.assert_allclose(values.loss, wanted.loss, rtol=1e-4, atol=1e-5)
    # A difference of two probabilities: its digits are those of the larger ones, and logs of -100 are off by 1e-5.
    assert np.linalg.norm(gradient - wanted_gradient) <= 1e-4 * np.linalg.norm(wanted_gradient) + 3e-5


@pytest.mark.parametrize("name", ["taid", "taid, bucket", "taid, mass_corrected", "forward_kl", "dkd"])
def test_a_tail_that_underflows_is_still_pulled_up_to_the_teacher_s_mass(name):
    # A tool that bounds the student's head at 1 - 1e-7 gives 3e-12 here, where the gradient is -.25.
    targets = cut(np.log([[0.5, 0.3, 0.2]]), top_k=1, labels=[0])
    _, gradient = value_and_gradient(every_loss()[name], np.array([[500.0, 0.0, 0.0]], np.float32), targets, 1.0)
    np.testing.assert_allclose(gradient, [[0.5, -0.25, -0.25]], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_pads_change_nothing(name):
    # A tool that divides by (position, id) pairs would give another value for each number of pads.
    student, teacher, draws = scene()
    values, gradient = value_and_gradient(every_loss()[name], student, cut(teacher, top_k=7, draws=draws), 0.4)
    padded, same = value_and_gradient(every_loss()[name], student, cut(teacher, top_k=7, draws=draws, pads=4), 0.4)
    np.testing.assert_allclose(values.loss, padded.loss, atol=1e-13)
    np.testing.assert_allclose(gradient, same, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_kept_ids_changes_nothing(name):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(targets, ids=targets.ids[:, order], logprobs=targets.logprobs[:, order])
    values, gradient = value_and_gradient(every_loss()[name], student, targets, 0.4)
    again, same = value_and_gradient(every_loss()[name], student, shuffled, 0.4)
    np.testing.assert_allclose(values.loss, again.loss, atol=1e-13)
    np.testing.assert_allclose(gradient, same, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_adding_a_number_to_all_logits_changes_nothing_and_gradients_sum_to_0(name):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    values, gradient = value_and_gradient(every_loss()[name], student, targets, 0.4)
    again, same = value_and_gradient(every_loss()[name], student + 30, targets, 0.4)
    np.testing.assert_allclose(values.loss, again.loss, atol=1e-12)
    np.testing.assert_allclose(gradient, same, atol=1e-12)
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_positions_do_not_see_each_other(name):
    student, teacher, draws = scene()
    values, gradient = value_and_gradient(every_loss()[name], student, cut(teacher, top_k=7, draws=draws), 0.4)
    for m in range(6):
        alone = cut(teacher, top_k=7, draws=draws).part(m, m + 1)
        value, slope = value_and_gradient(every_loss()[name], student[m : m + 1], alone, 0.4)
        assert value.loss.item() == pytest.approx(values.loss[m].item(), abs=1e-13)
        np.testing.assert_allclose(slope[0], gradient[m], atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_no_positions_give_no_loss_and_no_gradient(name):
    student, teacher, draws = scene()
    empty = cut(teacher, top_k=7, draws=draws).part(0, 0)
    values, gradient = value_and_gradient(every_loss()[name], student[:0], empty, 0.4)
    assert values.loss.shape == (0,)
    assert gradient.shape == (0, 20)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_are_widened_and_their_gradient_comes_back_in_bfloat16(name):
    student, teacher, draws = scene()
    leaf = torch.tensor(student).bfloat16().requires_grad_()
    targets = cut(teacher, top_k=7, draws=draws)
    total, values = loss_on_logits(leaf, targets, every_loss()[name], t=0.4)
    total.backward()
    _, wanted = value_and_gradient(every_loss()[name], leaf.detach().double().numpy(), targets, 0.4)
    assert values.loss.dtype in (torch.float32, torch.float64)
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    np.testing.assert_allclose(leaf.grad.double(), wanted, atol=4e-3 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_given_are_left_as_they_were(name):
    student, teacher, draws = scene()
    leaf = torch.tensor(student, requires_grad=True)
    loss_on_logits(leaf, cut(teacher, top_k=7, draws=draws), every_loss()[name], t=0.4)
    np.testing.assert_array_equal(leaf.detach(), student)


@pytest.mark.parametrize("name", NAMES)
def test_bucket_kl_is_the_same_measure_for_every_loss(name):
    student, teacher, draws = scene()
    targets = cut(teacher, top_k=7, draws=draws)
    values, _ = value_and_gradient(every_loss()[name], student, targets, 0.4)
    for m in range(6):
        wanted = reference.bucket_kl(student[m], *known(targets, m))
        assert values.bucket_kl[m].item() == pytest.approx(wanted, abs=1e-12)
