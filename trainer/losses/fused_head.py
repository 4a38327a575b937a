"""The head and the loss in one: hidden states and the head's weight come in, one number with its gradients goes out.

Shape letters: `M` target positions, `D` width, `V` rows of the head, `C` target positions of a chunk.

Chunk by chunk over the positions: logits `[C, V]`, the loss, the gradient by the logits in the same memory, and from it
those by hidden states and head, before the next chunk begins. Neither `[M, V]` logits nor their gradient ever exist, so
that memory beyond the head's own gradient does not grow with `M`. The technique is that of Liger-Kernel's fused linear
cross-entropy; what a chunk computes is `objective`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.targets import SparseTargets

from .objective import Objective
from .protocol import LossValues

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Memory of one chunk's float32 logits. Each chunk moves the whole gradient of the head once, so a chunk must not be
small; benchmarks/loss.py says what it costs."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """How hidden states become logits: `softcap(hidden @ weight[:token_count].T + bias)`.

    `weight [V, D]`, `bias [V]` or None; rows from `token_count` on are padding, and left out of the softmax.
    `softcap`: c in `c tanh(z / c)`, Gemma 2's; None leaves logits as they are.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    token_count: int
    softcap: float | None = None


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
    """`weight * sum(loss)` of `hidden [M, D]`, differentiable by it and by the head, and the values of each position.

    Products are taken in the dtype of autocast where that is on, else in that of `hidden`; logits, loss and sums over
    chunks are float32 at least. Nothing is computed for a head that is frozen.
    """
    kept: list[LossValues] = []
    total = _OnHidden.apply(hidden, head.weight, head.bias, head, targets, objective, t, weight, chunk_bytes, kept)
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
        kept: list[LossValues],
    ) -> torch.Tensor:
        device = hidden.device.type
        factors = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            chunks = _Chunks(hidden, head, factors=factors, needs=ctx.needs_input_grad[:3], chunk_bytes=chunk_bytes)
            for start, stop in chunks.borders():
                logits = chunks.logits(start, stop)
                part = targets.part(start, stop)
                values = objective.descend_(logits, part, t=t, weight=weight, with_gradient=chunks.wanted)
                kept.append(values)
                if chunks.wanted:
                    chunks.add_gradient(start, stop, logits)
        kept[:] = [_joined(kept)]
        ctx.save_for_backward(chunks.by_hidden, chunks.by_weight, chunks.by_bias)
        return weight * kept[0].loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: the head's gradient is the largest tensor of a step, and nobody else holds it.
        gradients = [None if it is None else it.mul_(grad_total.to(it.dtype)) for it in ctx.saved_tensors]
        return *gradients, None, None, None, None, None, None, None


class _Chunks:
    """The memory of one call: logits of a chunk, gradients of the whole."""

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        *,
        factors: torch.dtype,
        needs: tuple[bool, ...],
        chunk_bytes: int | None,
    ):
        self.head, self.wanted = head, any(needs)
        self._hidden = hidden.to(factors)
        self._weight = head.weight[: head.token_count].to(factors)
        self._wide = torch.promote_types(factors, torch.float32)
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
        rows = max(1, budget // (self._weight.shape[0] * self._wide.itemsize))
        # Chunks of one size: the last one is not a sliver that moves the head's whole gradient for a few positions.
        count = max(1, -(-hidden.shape[0] // rows))
        self._rows = max(1, -(-hidden.shape[0] // count))
        self._buffer = hidden.new_empty(self._rows, self._weight.shape[0], dtype=self._wide)
        self._slope: torch.Tensor | None = None
        self.by_hidden = torch.empty_like(hidden) if needs[0] else None
        self.by_weight = torch.zeros_like(head.weight, dtype=self._wide) if needs[1] else None
        self.by_bias = torch.zeros_like(head.bias, dtype=self._wide) if needs[2] and head.bias is not None else None

    def borders(self) -> list[tuple[int, int]]:
        """Start and stop of each chunk; one empty chunk where there are no positions."""
        size = self._hidden.shape[0]
        return [(start, min(start + self._rows, size)) for start in range(0, max(size, 1), self._rows)]

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """`[C, V]`, in the memory that every chunk uses."""
        logits = _product(self._hidden[start:stop], self._weight.t(), out=self._buffer[: stop - start])
        if self.head.bias is not None:
            logits += self.head.bias[: self.head.token_count]
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_()
            self._slope = 1 - logits.square()
            logits.mul_(self.head.softcap)
        return logits

    def add_gradient(self, start: int, stop: int, gradient: torch.Tensor) -> None:
        """Take the gradient `[C, V]` by the logits of a chunk."""
        if self._slope is not None:
            gradient.mul_(self._slope)
        if self.by_bias is not None:
            self.by_bias[: self.head.token_count] += gradient.sum(0)
        factor = gradient.to(self._weight.dtype)
        if self.by_hidden is not None:
            self.by_hidden[start:stop] = factor @ self._weight
        if self.by_weight is not None:
            rows = self.by_weight[: self.head.token_count]
            if factor.dtype == rows.dtype:
                rows.addmm_(factor.t(), self._hidden[start:stop])
            else:
                rows += _product(factor.t(), self._hidden[start:stop])


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`left @ right`, float32 at least; into `out` where it is given."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == wide:
        return left @ right if out is None else torch.mm(left, right, out=out)
    if left.is_cuda:
        # Without `out_dtype` the sums, kept in float32 by the GPU, would be rounded to the factors' dtype at the end.
        product = torch.mm(left, right, out_dtype=wide)
    else:
        product = left.to(wide) @ right.to(wide)
    return product if out is None else out.copy_(product)


def _joined(parts: list[LossValues]) -> LossValues:
    names = ("loss", "distillation", "bucket_kl")
    return LossValues(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
