"""The loss and its gradient, computed in chunks behind the head or from existing logits.

Shape letters: `M` target positions, `D` width, `V` rows of the head, `C` target positions of a chunk.

`loss_on_hidden` computes per chunk the logits `[C, V]`, the loss, the gradient with respect to the logits in the same
memory, and from that the gradients with respect to hidden states and head. Neither the `[M, V]` logits nor their
gradient ever exist, so memory beyond the head's own gradient does not grow with `M`. The technique is that of
Liger-Kernel's fused linear cross-entropy. `loss_on_logits` is the plain way, for a head that cannot be computed in
chunks, and the reference in tests. What both minimize is an `Objective`: a loss of the cache and a share of the labels'
cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from coldstill.trainer.targets import SparseTargets

from .logit_view import RowPasses, StudentLogProbs, forward_

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Memory of one chunk's float32 logits. Each chunk moves the whole gradient of the head, so a chunk must not be small.
CPU: 882 positions at [D, V] = [512, 151,936] took 6.2, 6.1, 5.9 and 5.9 s in chunks of 64, 128, 256 and 512 MB (means
of two or three runs; one core of an AMD EPYC, 21 November 2026). CUDA: estimated, not measured. Moving the gradient
costs about 500 / C of the products' time, at 3 TB/s and 600 Tflop/s in bfloat16; 1 GB is C = 1,800 at that vocabulary.
"""


class SparseLoss(Protocol):
    """A loss of sparse targets in plain torch. Autograd gives its gradient with respect to the log-probs, and
    `logit_view.py` that with respect to the logits, in closed form. A target that must not be differentiated is
    detached."""

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value per position `[M]` in nats; `t` in [0, 1] is TAID's, other losses ignore it."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossValues:
    """One value per target position, in nats; nothing is averaged here.

    `loss [M]`: what is minimized. `distillation [M]`: its part from the teacher only, which the schedule of t follows.
    `bucket_kl [M]`: KL(teacher || student) over the K kept ids and ONE bucket for the rest: the same measure for every
    loss and t, for monitoring. It is a lower bound: never call it the KL to the teacher.
    """

    loss: torch.Tensor
    distillation: torch.Tensor
    bucket_kl: torch.Tensor

    def detached(self) -> LossValues:
        """The same values without a gradient."""
        return LossValues(**{name: tensor.detach() for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Objective:
    """`(1 - s) distillation + s cross-entropy`, with s the `cross_entropy_share`."""

    distillation: SparseLoss
    cross_entropy_share: float = 0.0

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> LossValues:
        """Values of the `M` positions; `loss` is differentiable by autograd with respect to `student`."""
        share = self.cross_entropy_share
        distillation, bucket_kl = self.compared(student, targets, t=t)
        loss = distillation if share == 0 else (1 - share) * distillation - share * student.log_q_label
        return LossValues(loss=loss, distillation=distillation, bucket_kl=bucket_kl.detach())

    def compared(
        self, student: StudentLogProbs, targets: SparseTargets, *, t: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The values `[M]` of the teacher's part, and of `bucket_kl`, which needs no gradient."""
        distillation = self.distillation(student, targets, t=t)
        with torch.no_grad():
            return distillation, student.buckets(targets).kl()

    def forward_backward_(
        self,
        logits: torch.Tensor,
        targets: SparseTargets,
        *,
        t: float,
        with_gradient: bool,
        passes: RowPasses | None = None,
    ) -> LossValues:
        """Values of `logits [M, V]` (float32 or float64), which are overwritten: `with_gradient` they then hold the
        gradient of `sum(loss)` with respect to them. `passes` default to the fastest of the device."""
        view = forward_(logits, targets, passes=passes)
        if not with_gradient:
            return self(view.log_probs, targets, t=t).detached()
        leaves = view.log_probs.leaves()
        with torch.enable_grad():
            values = self(leaves, targets, t=t)
            total = values.loss.sum()
        gradients = torch.autograd.grad(total, list(vars(leaves).values()), allow_unused=True, materialize_grads=True)
        view.backward_(StudentLogProbs(**dict(zip(vars(leaves), gradients, strict=True))), targets)
        return values.detached()


@dataclass(frozen=True, kw_only=True)
class Head:
    """How hidden states become logits: `softcap(hidden @ weight[:token_count].T + bias)`.

    `weight [V, D]`, `bias [V]` or None; rows from `token_count` on are padding, excluded from the softmax.
    `softcap`: c in `c tanh(z / c)` (Gemma 2); None for none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    token_count: int
    softcap: float | None = None


# Kept out of torch.compile: there is nothing to fuse here, and many small shapes to guard.
@torch.compiler.disable
def loss_on_hidden(
    hidden: torch.Tensor,
    head: Head,
    targets: SparseTargets,
    objective: Objective,
    *,
    t: float,
    weight: float = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, LossValues]:
    """`weight * sum(loss)` of `hidden [M, D]`, differentiable with respect to it and the head, and the values of each
    position.

    Matrix products take factors in the dtype of autocast if that is on, else in that of `hidden`; logits, loss and
    sums over chunks are float32 at least. A frozen head gets no gradient, and none is computed if gradients are off.
    The forward pass computes the gradients, so one backward pass may follow; a second is a `RuntimeError`.
    """
    kept: list[LossValues] = []
    grad_enabled = torch.is_grad_enabled()
    total = _OnHidden.apply(
        hidden, head.weight, head.bias, head, targets, objective, t, weight, chunk_bytes, grad_enabled, kept
    )
    return total, kept[0]


class _OnHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head_weight: torch.Tensor,
        head_bias: torch.Tensor | None,
        head: Head,
        targets: SparseTargets,
        objective: Objective,
        t: float,
        weight: float,
        chunk_bytes: int | None,
        grad_enabled: bool,
        kept: list[LossValues],
    ) -> torch.Tensor:
        device = hidden.device.type
        factors = _dtype_of_factors(hidden)
        # Gradients are always off in here; `needs_input_grad` tells which inputs require one, not whether it is wanted.
        needs = [grad_enabled and it for it in ctx.needs_input_grad[:3]]
        with torch.autocast(device, enabled=False):
            chunks = _Chunks(hidden, head, targets, factors=factors, needs=needs, chunk_bytes=chunk_bytes)
            for start, stop in chunks.borders:
                logits = chunks.logits(start, stop)
                part = targets.part(start, stop)
                values = objective.forward_backward_(logits, part, t=t, with_gradient=any(needs))
                kept.append(values)
                if any(needs):
                    chunks.add_gradient(start, stop, logits)
        kept[:] = [_joined(kept)]
        ctx.weight = weight
        ctx.save_for_backward(chunks.by_hidden, chunks.by_weight, chunks.by_bias)
        return weight * kept[0].loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Here, not in the chunks: in float16 the gradient of one position, a share of 1/M, would underflow.
        # In place: the head's gradient is the largest tensor of a step, and nothing else holds it.
        gradients = [None if it is None else it.mul_(ctx.weight * grad_total) for it in ctx.saved_tensors]
        return *gradients, None, None, None, None, None, None, None, None


class _Chunks:
    """The memory of one call: logits of a chunk, gradients of the whole."""

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        targets: SparseTargets,
        *,
        factors: torch.dtype,
        needs: list[bool],
        chunk_bytes: int | None,
    ):
        self._head = head
        self._wide = torch.promote_types(factors, torch.float32)
        self._hidden = _factor(hidden, factors)
        self._weight = _factor(head.weight[: head.token_count], factors)
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
        rows = max(1, budget // (head.token_count * self._wide.itemsize))
        self.borders = targets.borders(rows)
        longest = max(stop - start for start, stop in self.borders)
        self._logits = hidden.new_empty(longest, head.token_count, dtype=self._wide)
        self._slope = torch.empty_like(self._logits) if head.softcap is not None and any(needs) else None
        self.by_hidden = torch.empty_like(hidden) if needs[0] else None
        self.by_weight = torch.empty_like(head.weight, dtype=self._wide) if needs[1] else None
        self.by_bias = torch.zeros_like(head.bias, dtype=self._wide) if needs[2] and head.bias is not None else None
        if self.by_weight is not None:
            self.by_weight[head.token_count :] = 0

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """`[C, V]`, in the memory that every chunk uses."""
        logits = _product(self._hidden[start:stop], self._weight.t(), out=self._logits[: stop - start])
        return _finished(logits, self._head, slope=None if self._slope is None else self._slope[: stop - start])

    def add_gradient(self, start: int, stop: int, gradient: torch.Tensor) -> None:
        """Add the part of a chunk whose gradient with respect to its logits is `gradient [C, V]`."""
        if self._slope is not None:
            gradient.mul_(self._slope[: stop - start])
        if self.by_bias is not None:
            self.by_bias[: self._head.token_count] += gradient.sum(0)
        gradient = gradient.to(self._weight.dtype)
        if self.by_hidden is not None:
            self.by_hidden[start:stop] = gradient @ self._weight
        if self.by_weight is not None:
            rows = self.by_weight[: self._head.token_count]
            if start == 0:
                _product(gradient.t(), self._hidden[start:stop], out=rows)
            elif gradient.dtype == rows.dtype:
                rows.addmm_(gradient.t(), self._hidden[start:stop])
            else:
                rows += _product(gradient.t(), self._hidden[start:stop], out=torch.empty_like(rows))


def logits_in_parts(hidden: torch.Tensor, head: Head) -> Callable[[int, int], torch.Tensor]:
    """`(start, stop) -> [stop - start, V]`: logits of a part of `hidden [M, D]` without a gradient, of the precision of
    `loss_on_hidden`. A layer of autocast would round them to 16 bits: the two largest of a position are then often
    equal.
    """
    factors = _dtype_of_factors(hidden)
    rows, weight = _factor(hidden, factors), _factor(head.weight[: head.token_count], factors)
    dtype = torch.promote_types(factors, torch.float32)

    def part(start: int, stop: int) -> torch.Tensor:
        taken = rows[start:stop]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            out = taken.new_empty(len(taken), head.token_count, dtype=dtype)
            return _finished(_product(taken, weight.t(), out=out), head)

    return part


def _dtype_of_factors(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _factor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Only CUDA multiplies 16-bit factors into float32; elsewhere their rounded values are multiplied in float32.
    rounded = tensor.to(dtype)
    return rounded if tensor.is_cuda else rounded.to(torch.promote_types(dtype, torch.float32))


def _finished(logits: torch.Tensor, head: Head, *, slope: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of `head` from its products, in their memory; `slope` gets the derivative of the soft-capping."""
    if head.bias is not None:
        logits += head.bias[: head.token_count]
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        if slope is not None:
            torch.square(logits, out=slope).neg_().add_(1)
        logits.mul_(head.softcap)
    return logits


def _product(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """`left @ right` into `out`, which is float32 or float64; its sums are of that dtype, whatever the factors'."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _joined(parts: list[LossValues]) -> LossValues:
    names = ("loss", "distillation", "bucket_kl")
    return LossValues(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@torch.compiler.disable
def loss_on_logits(
    logits: torch.Tensor, targets: SparseTargets, objective: Objective, *, t: float, weight: float = 1.0
) -> tuple[torch.Tensor, LossValues]:
    """`weight * sum(loss)` of `logits [M, V]`, differentiable with respect to them, and the values of each position.

    Computed in float32 at least, whatever the logits' dtype.
    """
    kept: list[LossValues] = []
    total = _OnLogits.apply(logits, targets, objective, t, weight, torch.is_grad_enabled(), kept)
    return total, kept[0]


class _OnLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: SparseTargets,
        objective: Objective,
        t: float,
        weight: float,
        grad_enabled: bool,
        kept: list[LossValues],
    ) -> torch.Tensor:
        with_gradient = grad_enabled and ctx.needs_input_grad[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        values = objective.forward_backward_(wide, targets, t=t, with_gradient=with_gradient)
        kept.append(values)
        if with_gradient:
            ctx.save_for_backward(wide)
            ctx.weight, ctx.logits_dtype = weight, logits.dtype
        return weight * values.loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * (ctx.weight * grad_total)).to(ctx.logits_dtype), None, None, None, None, None, None
