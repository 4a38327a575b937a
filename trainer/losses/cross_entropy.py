"""Plain fine-tuning on the rows' own tokens.

Shape letters: `M` target positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .base import Loss

if TYPE_CHECKING:
    import torch

    from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
    from coldstill.trainer.targets import SparseTargets


class CrossEntropy(Loss):
    """`-log q(label)`: exact on every dataset, and without any teacher."""

    title: ClassVar[str] = "cross-entropy on the rows' own tokens; no teacher"
    arxiv: ClassVar[str | None] = None
    eval_loss: ClassVar[tuple[str, ...]] = ("cross_entropy",)

    name: Literal["cross_entropy"] = Field("cross_entropy", description="Plain fine-tuning, for comparison.")

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `targets` and `t` are ignored."""
        return -student.log_q_label
