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

from coldstill.trainer.targets import SparseTargets

from .objective import Objective
from .protocol import LossValues

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Memory of one chunk's float32 logits. Each chunk moves the whole gradient of the head, so a chunk must not be small.
CPU: 882 positions at [D, V] = [512, 151,936] took 6.2, 6.1, 5.9 and 5.9 s in chunks of 64, 128, 256 and 512 MB (means
of two or three runs; one core of an AMD EPYC, 21 November 2026). CUDA: reasoned, not measured. Moving the gradient
costs about 500 / C of the products' time, at 3 TB/s and 600 Tflop/s in bfloat16; 1 GB is C = 1,800 at that vocabulary.
"""


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


# A compiled student calls it as it is: there is nothing here for a compiler to fuse but many small shapes to guard.
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
    """`weight * sum(loss)` of `hidden [M, D]`, differentiable by it and by the head, and the values of each position.

    Products are taken of factors in the dtype of autocast where that is on, else in that of `hidden`; logits, loss and
    sums over chunks are float32 at least. Nothing is computed for a head that is frozen, nor any gradient where they
    are off. The gradients are made on the way, so one backward pass may follow; a second is a `RuntimeError`.
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
        factors = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # In here gradients are always off, and `needs_input_grad` says what the inputs ask for, not whether they may.
        needs = [grad_enabled and it for it in ctx.needs_input_grad[:3]]
        with torch.autocast(device, enabled=False):
            chunks = _Chunks(hidden, head, factors=factors, needs=needs, chunk_bytes=chunk_bytes)
            for start, stop in chunks.borders():
                logits = chunks.logits(start, stop)
                part = targets.part(start, stop)
                values = objective.descend_(logits, part, t=t, with_gradient=any(needs))
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
        # In place: the head's gradient is the largest tensor of a step, and nobody else holds it.
        gradients = [None if it is None else it.mul_(ctx.weight * grad_total) for it in ctx.saved_tensors]
        return *gradients, None, None, None, None, None, None, None, None


class _Chunks:
    """The memory of one call: logits of a chunk, gradients of the whole."""

    def __init__(
        self, hidden: torch.Tensor, head: Head, *, factors: torch.dtype, needs: list[bool], chunk_bytes: int | None
    ):
        self._head = head
        self._wide = torch.promote_types(factors, torch.float32)
        self._hidden = self._factor(hidden.to(factors))
        self._weight = self._factor(head.weight[: head.token_count].to(factors))
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
        rows = max(1, budget // (head.token_count * self._wide.itemsize))
        # Chunks of one size: the last one is not a sliver that moves the head's whole gradient for a few positions.
        count = max(1, -(-hidden.shape[0] // rows))
        self._rows = max(1, -(-hidden.shape[0] // count))
        self._logits = hidden.new_empty(self._rows, head.token_count, dtype=self._wide)
        self._slope = torch.empty_like(self._logits) if head.softcap is not None and any(needs) else None
        self.by_hidden = torch.empty_like(hidden) if needs[0] else None
        self.by_weight = torch.empty_like(head.weight, dtype=self._wide) if needs[1] else None
        self.by_bias = torch.zeros_like(head.bias, dtype=self._wide) if needs[2] and head.bias is not None else None
        if self.by_weight is not None:
            self.by_weight[head.token_count :] = 0

    def _factor(self, tensor: torch.Tensor) -> torch.Tensor:
        # Only CUDA multiplies 16-bit factors into float32; elsewhere their rounded values are multiplied in float32.
        return tensor if tensor.is_cuda else tensor.to(self._wide)

    def borders(self) -> list[tuple[int, int]]:
        """Start and stop of each chunk; one empty chunk where there are no positions."""
        size = self._hidden.shape[0]
        return [(start, min(start + self._rows, size)) for start in range(0, max(size, 1), self._rows)]

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """`[C, V]`, in the memory that every chunk uses."""
        logits = _product(self._hidden[start:stop], self._weight.t(), out=self._logits[: stop - start])
        if self._head.bias is not None:
            logits += self._head.bias[: self._head.token_count]
        if self._head.softcap is not None:
            logits.div_(self._head.softcap).tanh_()
            if self._slope is not None:
                torch.square(logits, out=self._slope[: stop - start]).neg_().add_(1)
            logits.mul_(self._head.softcap)
        return logits

    def add_gradient(self, start: int, stop: int, gradient: torch.Tensor) -> None:
        """Take the gradient `[C, V]` by the logits of a chunk."""
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


def _product(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """`left @ right` into `out`, which is float32 or float64; its sums are of that dtype, whatever the factors'."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _joined(parts: list[LossValues]) -> LossValues:
    names = ("loss", "distillation", "bucket_kl")
    return LossValues(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
