"""TAID as if the cache were all of the teacher: what other tools make of a top-k, here to be compared with.

Shape letters: `M` target positions, `K` teacher top-k.

Neither is the teacher's loss, in expectation or otherwise. Measured on a flat teacher with K = 32: KL to the teacher
1.13 after training, against .61 of plain fine-tuning and .36 with draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coldstill.trainer.targets import SparseTargets

from .cache_view import CacheView
from .protocol import StudentView
from .taid import interpolated


@dataclass(frozen=True)
class RenormalisedTaid:
    """TAID between the two distributions over the kept ids alone, each made to sum to 1: the logits outside the kept
    ids get no gradient, so nothing teaches how much mass the tail should have."""

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`: `KL(P || q)` over K symbols; 0 at t = 0."""
        both = CacheView.of(view, targets, tail="renormalise")
        log_target = both.log_softmax(interpolated(both, t))
        return both.expect(log_target.exp(), log_target - both.log_q)


@dataclass(frozen=True)
class ZeroTailTaid:
    """TAID against a teacher that gives no mass to what is not kept: the target sums to 1 over the kept ids, the
    student over the whole vocabulary, so the student's tail is pulled to nothing, however small t is."""

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`: `-log(1 - m_q)` is left of it as t falls to 0."""
        kept = CacheView.of(view, targets, tail="renormalise")
        log_target = kept.log_softmax(interpolated(kept, t))
        return kept.expect(log_target.exp(), log_target - CacheView.of(view, targets).log_q)
