"""Offline on-policy distillation from the log-probs of the student's own tokens.

Shape letters: `M` target positions.

Lightning OPD (arXiv 2604.13010), on rows that the student wrote before training:

    A = log p(y) - log q(y), without gradient          (y the label)
    loss = -A log q(y)

At the parameters that wrote the rows, its gradient is, over the student's samples, that of `KL(q || p)` at each
position. The further training moves the student from them, the less it is: a new round writes new rows.

WHAT THE TRUNCATION LEAVES OUT: nothing. Every cache holds the label's own log-prob.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .base import Need, TeacherLoss

if TYPE_CHECKING:
    import torch

    from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
    from coldstill.trainer.targets import SparseTargets


class LightningOpd(TeacherLoss):
    """`-sg(log p(y) - log q(y)) log q(y)`; its value is no divergence, and can be negative."""

    title: ClassVar[str] = "Lightning OPD: policy gradient on the student's own tokens"
    arxiv: ClassVar[str | None] = "2604.13010"

    name: Literal["lightning_opd"] = Field(
        "lightning_opd", description="Policy gradient on rows that the student wrote and the teacher scored."
    )
    any_rows: bool = Field(
        False,
        description="Train on rows of other writers too, on which the loss is no estimate of a divergence.",
    )

    @property
    def all_needs(self) -> frozenset[Need]:
        """Rows that the student wrote, unless `any_rows` accepts others."""
        return self.needs if self.any_rows else self.needs | {"student_rows"}

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `t` is ignored."""
        log_q = student.log_q_label
        advantage = targets.label_logprob.to(log_q.dtype) - log_q.detach()
        return -advantage * log_q
