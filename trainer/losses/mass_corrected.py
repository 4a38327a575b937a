"""TAID whose tail has the mass that dense TAID would give it: the draws tell how far the two tails' shapes differ.

Shape letters: `M` target positions, `N` padded draws.

Dense TAID gives the tail the weight `sum over T of q^(1-t) p^t = m_q^(1-t) m_p^t R`, where, with q' and p' the two
tails' shapes, `R = E over draws of r`, `r = (q' / p')^(1-t)`, at most 1. The bucket takes R = 1, which is most of what
is wrong with its gradient at t < 1: relative error .52 against .14 with R estimated (t = .4, K = 16, 32 draws, a flat
teacher).

    R of a position = (sum of its r + c r_prior) / (its draws + c)

R is nearly one number for all positions, so the few draws of one are shrunk to the mean of all draws of the optimizer
step before, `r_prior`. That step is over, so neither chunks nor micro-batches nor devices change it.

WHAT IT LEAVES OUT: R is an estimate, so at t = 0 the gradient is noise instead of 0 (nobody trains there: the paper
starts at .2 to .4); the shape within the tail is mixed as in `taid`. It is needless at t = 1, where r is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from coldstill.trainer.targets import SparseTargets

from .cache_view import CacheView
from .memory import LossMemory
from .protocol import StudentView
from .taid import interpolated, pull_of_draws

PRIOR_DRAWS = 8.0
"""c: how many draws of its own weigh as much as the prior. Measured at t = .4 and .7, flat teacher: bias
.140 and .061 of the gradient with c = 8, .140 and .050 with 1, .169 and .075 with the prior alone."""

LARGEST_RATIO = 50.0
"""A draw counts as at most this: one that the student finds likely and the teacher does not would rule the estimate."""


class TailRatio(LossMemory):
    """`value`: the mean of r over all draws of the optimizer step before, 1 before the first."""

    value: float

    def __init__(self) -> None:
        super().__init__(sums=2)

    def initial_state(self) -> dict[str, Any]:
        return {"tail_ratio": 1.0}

    def update(self, sums: Sequence[float], *, step: int, total_steps: int) -> None:
        """`sums`: of r, and the number of draws; a step without draws changes nothing."""
        total, draws = sums
        if draws > 0:
            self.value = total / draws

    def logs(self) -> dict[str, float]:
        return {"taid_tail_ratio": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {"tail_ratio": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["tail_ratio"]


@dataclass(frozen=True, kw_only=True)
class MassCorrectedTaid:
    """TAID with the `mixture` tail and its corrected mass. The targets must hold the draws' log-probs."""

    memory: TailRatio = field(default_factory=TailRatio)

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value `[M]` at `t`; adds to the memory where `view` is differentiated."""
        both = CacheView.of(view, targets)
        with torch.no_grad():
            mean, draws = self._ratios(view, targets, t)
            if view.log_q.requires_grad:
                self.memory.add(torch.stack([(mean * draws).sum(), draws.sum()]))
            ratio = (mean * draws + PRIOR_DRAWS * self.memory.value) / (draws + PRIOR_DRAWS)
            scores = interpolated(both, t)
            # Where the student gives the draws no mass at all: log 0 would be no target.
            scores[:, -1] += ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log()
        log_target = both.log_softmax(scores)
        value = both.expect(log_target.exp(), log_target - both.log_q)
        return value + pull_of_draws(view, targets, t * log_target[:, -1].exp())

    def _ratios(self, view: StudentView, targets: SparseTargets, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted mean of r `[M]`, 0 without draws, and the number of draws `[M]` that it is worth."""
        assert targets.draw_logprobs is not None
        drawn, weights = targets.draw_weights > 0, targets.draw_weights.to(view.log_q.dtype)
        of_student = view.log_q_draws - view.log_q_tail[:, None]
        of_teacher = targets.draw_logprobs.to(view.log_q.dtype) - targets.log_tail[:, None]
        log_ratio = ((1 - t) * (of_student - of_teacher).masked_fill(~drawn, 0)).clamp_max(math.log(LARGEST_RATIO))
        whole = weights.sum(1)
        # Draws of unequal weight are worth fewer equal ones (Kish); n draws of 1 / n are worth n.
        worth = whole.square() / weights.square().sum(1).clamp_min(torch.finfo(weights.dtype).tiny)
        return (weights * log_ratio.exp()).sum(1) / whole.clamp_min(torch.finfo(weights.dtype).tiny), worth
