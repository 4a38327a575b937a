"""Plain fine-tuning on the rows' own tokens: the student's view comes in, one cross-entropy per position goes out."""

from __future__ import annotations

import torch

from coldstill.trainer.targets import SparseTargets

from .protocol import StudentView


class CrossEntropy:
    """`-log q(label)`: exact, whatever the cache holds; the teacher gives no gradient. Nothing is left out."""

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `targets` and `t` are not looked at."""
        return -view.log_q_label
