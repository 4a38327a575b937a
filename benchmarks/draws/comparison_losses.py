"""TAID as if the cache were the whole teacher: what other tools make of a top-k, for comparison only.

Shape letters: `M` target positions, `K` teacher top-k.

Neither is the teacher's loss, in expectation or otherwise. Measured on a flat teacher with K = 32: KL to the teacher
1.13 after training, against .61 of plain fine-tuning and .36 with draws. They are losses of one's own, as
`docs/adding_a_loss.md` describes: a training run can name them as
`benchmarks.draws.comparison_losses:RenormalizedTaid`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from coldstill.trainer.loss_kernels.logit_view import Buckets, StudentLogProbs
from coldstill.trainer.losses.base import TeacherLoss
from coldstill.trainer.targets import SparseTargets


class RenormalizedTaid(TeacherLoss):
    """TAID between the two distributions over the kept ids alone, each normalized to sum to 1. The logits outside the
    kept ids get no gradient, so the tail's mass is free."""

    title: ClassVar[str] = "TAID over the kept ids alone, renormalized"
    arxiv: ClassVar[str | None] = "2501.16937"

    name: Literal["renormalized_taid"] = Field("renormalized_taid", description="For comparison.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`: `KL(P || q)` over K symbols; 0 at t = 0."""
        kept = _kept_alone(student, targets)
        log_target = _log_target(kept, t)
        return kept.expect(log_target.exp(), log_target - kept.log_q)


class ZeroTailTaid(TeacherLoss):
    """TAID against a teacher without mass outside the kept ids: the target sums to 1 over the kept ids, the student
    over the whole vocabulary, so the student's tail is driven to nothing at every t."""

    title: ClassVar[str] = "TAID with a teacher tail of zero"
    arxiv: ClassVar[str | None] = "2501.16937"

    name: Literal["zero_tail_taid"] = Field("zero_tail_taid", description="For comparison.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`: `-log(1 - m_q)` remains as t falls to 0."""
        kept = _kept_alone(student, targets)
        log_target = _log_target(kept, t)
        return kept.expect(log_target.exp(), log_target - student.buckets(targets).log_q)


def _kept_alone(student: StudentLogProbs, targets: SparseTargets) -> Buckets:
    return student.buckets(targets).among(torch.nn.functional.pad(targets.kept, (0, 1), value=False))


def _log_target(kept: Buckets, t: float) -> torch.Tensor:
    return kept.log_softmax(torch.lerp(kept.log_q.detach(), kept.log_p, t))
