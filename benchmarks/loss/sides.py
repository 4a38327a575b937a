"""The sides of `benchmarks.loss`: each computes a loss and its gradients from hidden states, a head and targets.

Shape letters: `M` target positions, `D` width, `V` vocabulary, `K` teacher top-k, `N` padded draws, `C` positions of a
chunk.

The `naive` sides use autograd on `[M, V]` logits. Besides ours, two sides work in chunks: the products alone, and
cross-entropy. They share no code with ours and show how low the time can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from coldstill.trainer.loss_kernels.fused_head import CHUNK_BYTES, Head, Objective, loss_on_hidden
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.targets import SparseTargets

TOP_K = 16
T_OF_TAID = 0.4
LOGIT_SCALE = 3.0
"""Standard deviation of the random logits, about that of a small language model."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`hidden [M, D]` and `weight [V, D]` require gradients. Only the dense side has `teacher_logits [M, V]`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: SparseTargets
    teacher_logits: torch.Tensor | None


Side = Callable[[Inputs], torch.Tensor]


def make_inputs(
    *, positions: int, width: int, vocabulary: int, draws: int, dense: bool, device: str, seed: int
) -> Inputs:
    """Random inputs, equal for equal seeds: bfloat16 on CUDA, float32 on a CPU."""
    random = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = torch.empty(vocabulary, width).normal_(0, LOGIT_SCALE / width**0.5, generator=random)
    targets = _targets(positions, vocabulary, draws=draws, random=random)
    hidden = torch.randn(positions, width, generator=random)
    teacher = None
    if dense:
        teacher = torch.empty(positions, vocabulary).normal_(0, LOGIT_SCALE, generator=random).to(device, dtype)
    return Inputs(
        hidden=hidden.to(device, dtype).requires_grad_(),
        weight=weight.to(device, dtype).requires_grad_(),
        targets=targets.to(device),
        teacher_logits=teacher,
    )


def _targets(positions: int, vocabulary: int, *, draws: int, random: torch.Generator) -> SparseTargets:
    # K distinct ids from a random start, and draws that differ from them, without a sort over V.
    start = torch.randint(vocabulary, (positions, 1), generator=random)
    ids = (start + torch.arange(TOP_K)) % vocabulary
    counts = torch.poisson(torch.full((positions, 1), float(draws)), generator=random).long()
    drawn = torch.arange(int(counts.max())) < counts
    away = torch.randint(TOP_K, vocabulary, drawn.shape, generator=random)
    kept = (2 * torch.randn(positions, TOP_K, generator=random)).log_softmax(1)
    tail = torch.empty(positions).uniform_(0.05, 0.4, generator=random)
    return SparseTargets(
        ids=ids,
        logprobs=kept + torch.log1p(-tail)[:, None],
        log_tail=tail.log(),
        labels=torch.randint(vocabulary, (positions,), generator=random),
        label_logprob=torch.full((positions,), -2.0),
        draws=(start + away) % vocabulary * drawn,
        draw_weights=drawn / counts.clamp_min(1),
        draw_logprobs=None,
        row=torch.zeros(positions, dtype=torch.int64),
        position=torch.arange(positions),
    )


def naive_cross_entropy(inputs: Inputs) -> torch.Tensor:
    """`F.cross_entropy` of `[M, V]` logits."""
    logits = inputs.hidden @ inputs.weight.t()
    return F.cross_entropy(logits.float(), inputs.targets.labels, reduction="sum")


def dense_taid(inputs: Inputs) -> torch.Tensor:
    """TAID with the teacher's dense logits, by autograd, as its repository computes it (arXiv 2501.16937)."""
    assert inputs.teacher_logits is not None
    logits = inputs.hidden @ inputs.weight.t()
    mixed = (1 - T_OF_TAID) * logits.detach() + T_OF_TAID * inputs.teacher_logits
    target = F.softmax(mixed, dim=-1, dtype=torch.float32)
    log_q = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    products = torch.masked_fill(target * log_q, torch.isinf(logits), 0)
    return -products.sum()


def naive_sparse_taid(inputs: Inputs) -> torch.Tensor:
    """TAID from the cache with the mixture tail, by autograd on `[M, V]` logits: see trainer/losses/taid.py."""
    targets = inputs.targets
    logits = (inputs.hidden @ inputs.weight.t()).float()
    log_q = logits.log_softmax(1)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, targets.ids, True)
    tail = log_q.masked_fill(kept, -torch.inf).logsumexp(1, keepdim=True)
    student = torch.cat([log_q.gather(1, targets.ids), tail], 1)
    teacher = torch.cat([targets.logprobs, targets.log_tail[:, None]], 1)
    log_target = torch.lerp(student.detach(), teacher, T_OF_TAID).log_softmax(1)
    value = (log_target.exp() * (log_target - student)).sum()
    weights = T_OF_TAID * log_target[:, -1:].exp() * targets.draw_weights
    return value + (weights * (tail - log_q.gather(1, targets.draws))).sum()


def fused_sparse_taid(inputs: Inputs) -> torch.Tensor:
    """TAID from the cache by the trainer's fused head."""
    head = Head(weight=inputs.weight, bias=None, token_count=inputs.weight.shape[0])
    return loss_on_hidden(inputs.hidden, head, inputs.targets, Objective(Taid()), t=T_OF_TAID)[0]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy's gradient in place: a softmax in one pass, then the label."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):  # type: ignore[no-untyped-def]
        by_hidden, by_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for rows, memory in _chunks(hidden, weight):
            _multiply(hidden[rows], weight.t(), out=memory)
            torch.softmax(memory, 1, out=memory)
            label = labels[rows, None]
            total -= memory.gather(1, label).log().sum()
            memory.scatter_add_(1, label, torch.full_like(label, -1, dtype=memory.dtype))
            _backward_products(memory, rows, hidden, weight, by_hidden, by_weight)
        ctx.save_for_backward(by_hidden, by_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden.mul_(grad_total), by_weight.mul_(grad_total), None


class _ChunkedProducts(torch.autograd.Function):
    """The three matrix products of every chunked head, without any pass over the logits."""

    @staticmethod
    def forward(ctx, hidden, weight):  # type: ignore[no-untyped-def]
        by_hidden, by_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
        for rows, memory in _chunks(hidden, weight):
            _multiply(hidden[rows], weight.t(), out=memory)
            _backward_products(memory, rows, hidden, weight, by_hidden, by_weight)
        ctx.save_for_backward(by_hidden, by_weight)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, grad_total):  # type: ignore[no-untyped-def]
        return ctx.saved_tensors


def fused_cross_entropy(inputs: Inputs) -> torch.Tensor:
    """Cross-entropy in the same chunks as ours, in its own code."""
    total: torch.Tensor = _ChunkedCrossEntropy.apply(inputs.hidden, inputs.weight, inputs.targets.labels)
    return total


def products_alone(inputs: Inputs) -> torch.Tensor:
    """The floor of every chunked head with gradients."""
    total: torch.Tensor = _ChunkedProducts.apply(inputs.hidden, inputs.weight)
    return total


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    positions, vocabulary = hidden.shape[0], weight.shape[0]
    most = max(1, CHUNK_BYTES[hidden.device.type] // (4 * vocabulary))
    size = -(-positions // -(-positions // most))
    memory = torch.empty(size, vocabulary, dtype=torch.float32, device=hidden.device)
    starts = range(0, positions, size)
    return [(slice(n, n + size), memory[: min(size, positions - n)]) for n in starts]


def _multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _backward_products(
    gradient: torch.Tensor,
    rows: slice,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    by_hidden: torch.Tensor,
    by_weight: torch.Tensor,
) -> None:
    gradient = gradient.to(weight.dtype)
    by_hidden[rows] = gradient @ weight
    if rows.start == 0:
        _multiply(gradient.t(), hidden[rows], out=by_weight)
    elif gradient.dtype == by_weight.dtype:
        by_weight.addmm_(gradient.t(), hidden[rows])
    else:
        product = torch.empty_like(by_weight)
        _multiply(gradient.t(), hidden[rows], out=product)
        by_weight += product


SIDES: dict[str, Side] = {
    "products alone": products_alone,
    "naive cross-entropy": naive_cross_entropy,
    "fused cross-entropy": fused_cross_entropy,
    "dense TAID": dense_taid,
    "naive sparse TAID": naive_sparse_taid,
    "fused sparse TAID": fused_sparse_taid,
}
