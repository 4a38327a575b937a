"""Laws of the objective: ALM against a slow reference, gradients against finite differences, chunks of the head."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from coldstill.trainer.alignment.objective import AlignedObjective, AlignmentCounts, alm
from coldstill.trainer.alignment.targets import AlignedTargets
from coldstill.trainer.loss_kernels.fused_head import Head, Objective, loss_on_hidden, loss_on_logits
from coldstill.trainer.losses.divergences import ReverseKl
from coldstill.trainer.losses.taid import ForwardKl, Taid
from coldstill.trainer.targets import SparseTargets
from tests.trainer.loss_kernels.random_targets import random_targets

POSITIONS, VOCABULARY, WIDTH = 24, 19, 7


def aligned_targets(seed: int = 0) -> AlignedTargets:
    """Random targets: runs of one to five tokens, of which some are exact, some larger chunks, some lost."""
    plain = random_targets(POSITIONS, VOCABULARY, seed=seed)
    random = np.random.default_rng(seed)
    exact, chunk, logprob = np.zeros(POSITIONS, bool), np.full(POSITIONS, -1), np.zeros(POSITIONS)
    start = number = 0
    while start < POSITIONS:
        size = int(random.choice([1, 1, 1, 2, 3, 5]))
        kind = random.integers(0, 5)
        if size == 1 and kind < 3:
            exact[start] = True
        if kind < 4:
            chunk[start : start + size], number = number, number + 1
            logprob[start : start + size] = -3 * random.random() * size
        start += size
    assert exact.any()
    return AlignedTargets(
        **vars(plain),
        exact=torch.from_numpy(exact),
        chunk=torch.from_numpy(chunk),
        chunk_logprob=torch.from_numpy(logprob),
        byte_counts=torch.ones(POSITIONS, dtype=torch.long),
    )


def all_of(targets: AlignedTargets) -> SparseTargets:
    """All positions as plain targets, of which the slow reference takes single ones."""
    return SparseTargets(**{item.name: getattr(targets, item.name) for item in fields(SparseTargets)})


def objective(inner: Objective | None, **changes: float) -> AlignedObjective:
    return AlignedObjective.of(inner, **{"one_to_one": 0.7, "chunks": 1.3, "temperature": 50.0, **changes})


def slow_alm(a: float, b: float, tau: float) -> float:
    """The binary KL of the paper's two probabilities, times tau, from its definition."""
    x, y = math.exp(-a / tau), math.exp(-b / tau)
    return tau * (x * math.log(x / y) + (1 - x) * math.log((1 - x) / (1 - y)))


def slow_total(logits: np.ndarray, targets: AlignedTargets, inner: Objective, tau: float, share: float) -> float:
    """The sum of the objective over all positions, chunk by chunk in float64."""
    log_q = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = targets.labels.numpy()
    surprise = -log_q[np.arange(POSITIONS), labels]
    total = share * surprise.sum()
    values = loss_on_logits(torch.from_numpy(logits), all_of(targets), inner, t=0.6)[1].distillation
    for chunk, members in itertools.groupby(range(POSITIONS), lambda n: int(targets.chunk[n])):
        numbers = list(members)
        if targets.exact[numbers[0]]:
            total += (1 - share) * 0.7 * float(values[numbers[0]])
        elif chunk >= 0:
            a = -float(targets.chunk_logprob[numbers[0]])
            total += (1 - share) * 1.3 * slow_alm(a, surprise[numbers].sum(), tau)
    return float(total)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("loss", [ForwardKl(), ReverseKl()], ids=lambda loss: loss.name)
def test_the_objective_and_its_gradient_are_those_of_the_slow_reference(loss, share: float) -> None:
    """In chunks of the head of any size, and from logits; the gradient by central differences."""
    targets = aligned_targets()
    inner = Objective(loss, share)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(POSITIONS, WIDTH, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random, dtype=torch.float64, requires_grad=True)

    def slow() -> float:
        with torch.no_grad():
            return slow_total((hidden @ weight.T).numpy(), targets, Objective(loss), 50.0, share)

    logits = (hidden @ weight.T).detach().requires_grad_()
    total, values = loss_on_logits(logits, targets, objective(inner), t=0.6)
    assert total.item() == pytest.approx(slow(), rel=1e-9)
    assert values.loss.sum().item() == pytest.approx(total.item(), rel=1e-12)
    total.backward()
    for size in (1, 3, 8, POSITIONS):
        hidden.grad = weight.grad = None
        head = Head(weight=weight, bias=None, token_count=VOCABULARY)
        found, _ = loss_on_hidden(
            hidden, head, targets, objective(inner), t=0.6, chunk_bytes=size * VOCABULARY * hidden.itemsize
        )
        assert found.item() == pytest.approx(slow(), rel=1e-9)
        found.backward()
        torch.testing.assert_close(hidden.grad, logits.grad @ weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(weight.grad, logits.grad.T @ hidden, rtol=1e-9, atol=1e-12)
    step = 1e-6
    for tensor in (hidden, weight):
        for place in range(0, tensor.numel(), 11):
            flat = tensor.data.view(-1)
            before = flat[place].item()
            flat[place] = before + step
            above = slow()
            flat[place] = before - step
            below = slow()
            flat[place] = before
            wanted = (above - below) / (2 * step)
            assert tensor.grad.view(-1)[place].item() == pytest.approx(wanted, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0, 1e6])
def test_alm_is_the_binary_divergence_of_the_paper_and_finite_at_its_ends(tau: float) -> None:
    surprise = torch.tensor([1e-7, 1e-3, 0.1, 2.0, 30.0, 200.0], dtype=torch.float64)
    a, b = (one.flatten() for one in torch.meshgrid(surprise, surprise, indexing="ij"))
    student = b.clone().requires_grad_()
    found = alm(a, student, tau)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert (found >= -1e-9).all()
    torch.testing.assert_close(found[a == b], torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)
    for mine, theirs, value in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        if min(mine, theirs) >= 1e-3 and max(mine, theirs) / tau < 30 and tau < 1e5:
            assert value == pytest.approx(slow_alm(mine, theirs, tau), rel=1e-6, abs=1e-9)
    if tau == 1e6:
        usual = (a > 1e-4) & (b > 1e-4)
        limit = b - a + a * (a / b).log()
        torch.testing.assert_close(found[usual], limit[usual], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient[usual], (1 - a / b)[usual], rtol=1e-3, atol=1e-3)
    # In the precision of training, too.
    single = alm(a.float(), b.float(), tau)
    assert single.isfinite().all()


def test_cross_entropy_takes_every_position_also_lost_ones() -> None:
    targets = aligned_targets()
    logits = torch.randn(POSITIONS, VOCABULARY, dtype=torch.float64)
    values = loss_on_logits(logits, targets, objective(None), t=1.0)[1]
    wanted = -logits.log_softmax(1)[torch.arange(POSITIONS), targets.labels]
    torch.testing.assert_close(values.loss, wanted)


def test_lost_positions_have_no_loss_and_no_gradient() -> None:
    targets = aligned_targets()
    logits = torch.randn(POSITIONS, VOCABULARY, dtype=torch.float64, requires_grad=True)
    total, values = loss_on_logits(logits, targets, objective(Objective(Taid())), t=0.5)
    total.backward()
    lost = targets.chunk < 0
    assert lost.any()
    assert (values.loss[lost] == 0).all()
    assert (logits.grad[lost] == 0).all()
    assert (logits.grad[~lost].abs().sum(1) > 0).all()


def test_counts_add_up_over_steps_and_survive_a_checkpoint() -> None:
    counts = AlignmentCounts()
    batch = {"targets": aligned_targets(), "sample_ids": ["a", "b"], "skipped": [("b", "why")]}
    for step in (1, 2):
        counts.add_batch(batch)
        counts.add_values(torch.tensor(4.0), torch.tensor(2.0))
        counts.update(counts.take().tolist(), step=step, total_steps=2)
    one, larger = int(batch["targets"].exact.sum()), int(batch["targets"].in_larger_chunk.sum())
    found = counts.state_dict()
    assert (found["one_to_one"], found["in_larger_chunks"]) == (2 * one, 2 * larger)
    assert found["one_to_one"] + found["in_larger_chunks"] + found["lost"] == 2 * POSITIONS
    assert (found["rows"], found["skipped_rows"]) == (4, 2)
    assert found["one_to_one_loss"] == pytest.approx(4 / one)
    other = AlignmentCounts()
    other.load_state_dict(found)
    assert other.logs() == counts.logs()
    shares = [value for name, value in counts.logs().items() if name.startswith("share_")]
    assert sum(shares) == pytest.approx(1)
