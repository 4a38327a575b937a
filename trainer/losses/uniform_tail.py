"""TAID against a teacher whose tail is flat: whole logits and sparse targets come in, values and the gradient go out.

Shape letters: `M` target positions, `V` vocabulary.

The cache's mass outside the kept ids is spread evenly over all other ids, and dense TAID does the rest. This is for
comparison: a real tail is anything but flat, and plain fine-tuning did better (KL .72 against .61, a flat teacher).

No view of a few places can give `sum over T of q^(1-t)`, so this one reads whole logits: it is an objective of its own,
which takes the place of the view's closed form, chunk by chunk where the logits come in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coldstill.trainer.targets import SparseTargets

from .objective import Objective
from .protocol import LossValues, StudentView
from .row_passes import RowPasses
from .student_view import LOG_EMPTY_TAIL, see_


@dataclass(frozen=True)
class UniformTail:
    """TAID with the `uniform` tail; held at t = 1 (forward KL) where `at_teacher`."""

    at_teacher: bool = False

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Raises `TypeError`: a view is not enough."""
        raise TypeError("the uniform tail needs whole logits: call the objective's descend_")

    def log_target(self, log_q: torch.Tensor, targets: SparseTargets, t: float) -> torch.Tensor:
        """Log of the target `[M, V]`, for a student of log-probs `log_q [M, V]`."""
        others = log_q.shape[1] - targets.kept.sum(1, keepdim=True).to(log_q.dtype)
        flat = targets.log_tail[:, None].clamp_min(LOG_EMPTY_TAIL).to(log_q.dtype) - others.clamp_min(1).log()
        # An unused entry repeats the first id: it gets that one's value once more.
        kept = torch.where(targets.kept, targets.logprobs, targets.logprobs[:, :1]).to(log_q.dtype)
        log_p = flat.expand_as(log_q).scatter(1, targets.ids, kept)
        return torch.lerp(log_q, log_p, 1.0 if self.at_teacher else t).log_softmax(1)


@dataclass(frozen=True)
class UniformTailObjective(Objective):
    """`Objective` of a `UniformTail`; four times the memory of the logits."""

    distillation: UniformTail
    cross_entropy_share: float = 0.0

    def descend_(
        self,
        logits: torch.Tensor,
        targets: SparseTargets,
        *,
        t: float,
        with_gradient: bool,
        passes: RowPasses | None = None,
    ) -> LossValues:
        """As `Objective.descend_`."""
        view = see_(logits.clone(), targets, passes=passes).view
        log_q = logits.log_softmax(1)
        log_target = self.distillation.log_target(log_q, targets, t)
        distillation = (log_target.exp() * (log_target - log_q)).sum(1)
        if with_gradient:
            share = self.cross_entropy_share
            labels = torch.full_like(view.log_q_label, -share)[:, None]
            torch.sub(log_q.exp_(), log_target.exp_(), alpha=1 - share, out=logits)
            logits.scatter_add_(1, targets.labels[:, None], labels)
        return self.mixed(distillation, view, targets)
