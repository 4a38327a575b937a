"""The loss of logits that exist already: `[M, V]` logits come in, one number with its gradient goes out.

Shape letters: `M` target positions, `V` vocabulary.

The plain way, for a head that `fused_head` cannot compute, and its reference in tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from coldstill.trainer.targets import SparseTargets

from .objective import Objective
from .protocol import LossValues


@torch.compiler.disable
def loss_on_logits(
    logits: torch.Tensor, targets: SparseTargets, objective: Objective, *, t: float, weight: float = 1.0
) -> tuple[torch.Tensor, LossValues]:
    """`weight * sum(loss)` of `logits [M, V]`, differentiable by them, and the values of each position.

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
        # In here gradients are always off, and `needs_input_grad` says what the inputs ask for, not whether they may.
        with_gradient = grad_enabled and ctx.needs_input_grad[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        values = objective.descend_(wide, targets, t=t, with_gradient=with_gradient)
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
