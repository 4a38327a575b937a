"""What a training step minimises: a loss of the cache and a share of the labels' cross-entropy come together here.

Shape letters: `M` target positions, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coldstill.trainer.targets import SparseTargets

from .cache_view import bucket_kl
from .protocol import LossValues, SparseLoss, StudentView
from .row_passes import RowPasses
from .student_view import see_


@dataclass(frozen=True)
class Objective:
    """`(1 - s) distillation + s cross-entropy` with s the `cross_entropy_share`."""

    distillation: SparseLoss
    cross_entropy_share: float = 0.0

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float) -> LossValues:
        """Values of the `M` positions; `loss` carries the gradient by `view`."""
        return self.mixed(self.distillation(view, targets, t=t), view, targets)

    def mixed(self, distillation: torch.Tensor, view: StudentView, targets: SparseTargets) -> LossValues:
        """`distillation [M]` and the share of cross-entropy, as values of the `M` positions."""
        share = self.cross_entropy_share
        loss = distillation if share == 0 else (1 - share) * distillation - share * view.log_q_label
        with torch.no_grad():
            return LossValues(loss=loss, distillation=distillation, bucket_kl=bucket_kl(view, targets))

    def descend_(
        self,
        logits: torch.Tensor,
        targets: SparseTargets,
        *,
        t: float,
        with_gradient: bool,
        passes: RowPasses | None = None,
    ) -> LossValues:
        """Values of `logits [M, V]` (float32 or float64); the logits are overwritten, and `with_gradient` hold the
        gradient of `sum(loss)` by themselves. `passes`: the fastest that the device has."""
        seen = see_(logits, targets, passes=passes)
        if not with_gradient:
            return self(seen.view, targets, t=t).detached()
        leaves = seen.view.leaves()
        with torch.enable_grad():
            values = self(leaves, targets, t=t)
            total = values.loss.sum()
        gradients = torch.autograd.grad(total, list(vars(leaves).values()), allow_unused=True, materialize_grads=True)
        seen.gradient_(StudentView(**dict(zip(vars(leaves), gradients, strict=True))), targets)
        return values.detached()
