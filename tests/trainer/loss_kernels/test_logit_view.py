"""Laws of one look at the logits: the view is that of a plain log-softmax, its gradient that of plain autograd."""

from __future__ import annotations

import pytest
import torch

from coldstill.trainer.loss_kernels.fused_head import Objective, loss_on_logits
from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs, forward_
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.targets import SparseTargets
from tests.trainer.loss_kernels.random_targets import OBJECTIVES, plain_view, random_targets


def random_logits(positions: int, vocabulary: int, *, scale: float = 3.0, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(positions, vocabulary, generator=random, dtype=torch.float64)).requires_grad_()


def plain_gradient(logits: torch.Tensor, targets: SparseTargets, objective: Objective, t: float) -> torch.Tensor:
    total = objective(plain_view(logits, targets), targets, t=t).loss.sum()
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("top_k", [1, 5, 30])
@pytest.mark.parametrize("most_draws", [0, 4])
def test_the_view_is_that_of_a_plain_log_softmax(top_k: int, most_draws: int) -> None:
    targets = random_targets(9, 30, top_k=top_k, most_draws=most_draws)
    logits = random_logits(9, 30).detach()
    wanted = plain_view(logits, targets)
    found = forward_(logits.clone(), targets).log_probs
    for name, tensor in vars(wanted).items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=1e-13)


@pytest.mark.parametrize("top_k", [1, 5, 30])
@pytest.mark.parametrize("most_draws", [0, 4])
def test_the_gradient_of_any_function_of_the_view_is_that_of_plain_autograd(top_k: int, most_draws: int) -> None:
    targets = random_targets(9, 30, top_k=top_k, most_draws=most_draws)
    logits = random_logits(9, 30)
    random = torch.Generator().manual_seed(5)
    view = plain_view(logits, targets)
    by_view = {name: torch.randn(it.shape, generator=random, dtype=it.dtype) for name, it in vars(view).items()}
    total = sum((by_view[name] * it).sum() for name, it in vars(view).items())
    (wanted,) = torch.autograd.grad(total, logits)
    found = forward_(logits.detach().clone(), targets).backward_(StudentLogProbs(**by_view), targets)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_loss_of_logits_and_its_gradient_are_those_of_plain_autograd(objective: Objective, t: float) -> None:
    targets, logits = random_targets(9, 30), random_logits(9, 30)
    total, values = loss_on_logits(logits, targets, objective, t=t, weight=0.25)
    wanted = objective(plain_view(logits, targets), targets, t=t)
    for name, tensor in vars(wanted).items():
        torch.testing.assert_close(getattr(values, name), tensor.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(total, 0.25 * wanted.loss.sum(), rtol=0, atol=1e-12)
    (found,) = torch.autograd.grad(3 * total, logits)
    torch.testing.assert_close(found, 0.75 * plain_gradient(logits, targets, objective, t), rtol=0, atol=1e-13)


def test_a_logit_that_is_no_number_is_seen_at_its_position_and_at_no_other() -> None:
    targets, logits = random_targets(3, 30), random_logits(3, 30).detach()
    logits[1, int(set(range(30)).difference(targets.ids[1].tolist()).pop())] = torch.nan
    log_q_tail = forward_(logits, targets).log_probs.log_q_tail
    assert log_q_tail.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [1.0, 40.0, 400.0])
@pytest.mark.parametrize("t", [0.1, 0.4, 1.0])
def test_float32_stays_close_to_float64_however_small_the_student_s_tail(scale: float, t: float) -> None:
    exact = random_targets(64, 300, top_k=16)
    single = random_targets(64, 300, top_k=16, dtype=torch.float32)
    logits = random_logits(64, 300, scale=scale).detach().float()
    tails = plain_view(logits.double(), exact).log_q_tail
    assert scale < 400 or tails.min() < -200, "no tail of the student underflows"
    found, found_values = gradient_of(logits, single, t)
    wanted, wanted_values = gradient_of(logits.double(), exact, t)
    torch.testing.assert_close(found_values.double(), wanted_values, rtol=1e-4, atol=1e-5)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def gradient_of(logits: torch.Tensor, targets: SparseTargets, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    total, values = loss_on_logits(leaf, targets, Objective(Taid()), t=t)
    return torch.autograd.grad(total, leaf)[0], values.loss


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("winner", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_finite_where_the_teacher_s_kept_mass_is_exactly_1_and_the_student_s_tail_underflows(
    t: float, winner: int, scale: float
) -> None:
    one = torch.ones(1, dtype=torch.int64)
    targets = SparseTargets(
        ids=torch.tensor([[2, 2]]),
        logprobs=torch.tensor([[0.0, -torch.inf]]),
        log_tail=torch.tensor([-60.0]),
        labels=2 * one,
        label_logprob=torch.zeros(1),
        draws=torch.zeros(1, 0, dtype=torch.int64),
        draw_weights=torch.zeros(1, 0),
        draw_logprobs=None,
        row=one,
        position=one,
    )
    logits = torch.zeros(1, 5)
    logits[0, winner] = scale
    for objective in OBJECTIVES.values():
        leaf = logits.clone().requires_grad_()
        total, values = loss_on_logits(leaf, targets, objective, t=t)
        (gradient,) = torch.autograd.grad(total, leaf)
        assert all(tensor.isfinite().all() for tensor in vars(values).values())
        assert gradient.isfinite().all()
        assert gradient.sum().abs() < 1e-5


def test_an_empty_tail_of_float32_logits_leaves_cross_entropy_alone() -> None:
    targets = random_targets(6, 8, top_k=8, dtype=torch.float32)
    logits = random_logits(6, 8).detach().float().requires_grad_()
    total, _ = loss_on_logits(logits, targets, OBJECTIVES["cross_entropy"], t=1.0)
    wanted = torch.nn.functional.cross_entropy(logits, targets.labels, reduction="sum")
    torch.testing.assert_close(total, wanted)
    for found, by_hand in zip(torch.autograd.grad(total, logits), torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(found, by_hand)


def test_bfloat16_logits_are_widened_left_as_they_are_and_get_a_bfloat16_gradient() -> None:
    targets = random_targets(9, 30, dtype=torch.float32)
    logits = random_logits(9, 30).detach().bfloat16().requires_grad_()
    before = logits.detach().clone()
    total, values = loss_on_logits(logits, targets, OBJECTIVES["taid"], t=0.4)
    (gradient,) = torch.autograd.grad(total, logits)
    wide = logits.detach().double().requires_grad_()
    wanted = plain_gradient(wide, random_targets(9, 30), OBJECTIVES["taid"], 0.4)
    assert torch.equal(logits, before)
    assert values.loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    # Half a unit in the last place of numbers below 1.
    torch.testing.assert_close(gradient.double(), wanted, rtol=2**-9, atol=2**-9)


def test_logits_that_are_not_a_number_give_a_loss_that_is_not() -> None:
    targets, logits = random_targets(9, 30), random_logits(9, 30).detach()
    logits[3, 7] = torch.nan
    _, values = loss_on_logits(logits, targets, OBJECTIVES["taid"], t=0.4)
    assert values.loss.isnan().tolist() == [m == 3 for m in range(9)]
