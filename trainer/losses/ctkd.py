"""Curriculum temperature: the student's view and dense targets come in, one value per position goes out.

Shape letters: `M` target positions, `K` teacher top-k, here the whole vocabulary.

CTKD (arXiv 2211.16231) is forward KL at a temperature T that is trained AGAINST the student: it climbs the loss that
the student descends, harder and harder along a curriculum.

    loss = T^2 KL(p^(1/T) || q^(1/T)), both normalised,    T = 1 + 20 sigmoid(theta),    theta = 1 before the first step
    theta <- theta + rate * strength * d(mean loss)/d theta            once per optimizer step, over all its targets
    strength = (1 - cos(pi min(1, step / curriculum))) / 2             0 at first, 1 from the curriculum's end on

The published code of TAID never trains theta (its optimizer does not know it), so it is forward KL at T = 15.6 for
ever; and its gradient is not reversed. Here theta is a number of the loss's memory: the slope of the loss by T is added
up over the step as the loss itself is, so no optimizer has to know of it, and every device keeps the same T.

NEEDS A DENSE CACHE, K = V: at these temperatures the distribution is nearly flat, and the top of it says nothing of the
rest (64 of 32,000 ids hold about 2 % of the mass at T = 15.6). There is nothing it then leaves out.
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

LEAST_TEMPERATURE, TEMPERATURE_RANGE = 1.0, 20.0
"""T = 1 + 20 sigmoid(theta): the authors' `t_start` and `t_end`."""

FIRST_THETA = 1.0
"""The authors' first value: T = 15.6."""

CURRICULUM_SHARE = 10 / 240
"""The authors' curriculum takes 10 of 240 epochs."""

LEARNING_RATE = 0.1
"""The authors train theta with the student's SGD, at 0.1; a language model's 1e-4 would leave it where it is."""


class CurriculumTemperature(LossMemory):
    """`theta`, and `value`, the temperature made of it."""

    theta: float

    def __init__(self) -> None:
        super().__init__(sums=2)

    @property
    def value(self) -> float:
        """T, from 1 to 21."""
        return LEAST_TEMPERATURE + TEMPERATURE_RANGE / (1 + math.exp(-self.theta))

    def initial_state(self) -> dict[str, Any]:
        return {"theta": FIRST_THETA}

    def update(self, sums: Sequence[float], *, step: int, total_steps: int) -> None:
        """`sums`: of the slope of the loss by T, and the number of positions. theta climbs."""
        slope, positions = sums
        if positions == 0:
            return
        progress = min(1.0, step / max(1.0, CURRICULUM_SHARE * total_steps))
        strength = (1 - math.cos(math.pi * progress)) / 2
        risen = (self.value - LEAST_TEMPERATURE) / TEMPERATURE_RANGE
        self.theta += LEARNING_RATE * strength * slope / positions * TEMPERATURE_RANGE * risen * (1 - risen)

    def logs(self) -> dict[str, float]:
        return {"ctkd_temperature": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {"theta": self.theta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.theta = state["theta"]


@dataclass(frozen=True, kw_only=True)
class Ctkd:
    """Forward KL at the memory's temperature. Correct for targets that keep the whole vocabulary only."""

    memory: CurriculumTemperature = field(default_factory=CurriculumTemperature)

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float = 0.0) -> torch.Tensor:
        """Value `[M]`; `t` is not looked at. Adds to the memory where `view` is differentiated."""
        # No tail: the symbol of no mass, e^-60, would rise to e^-4 at T = 15.
        both = CacheView.of(view, targets, tail="renormalise")
        temperature = self.memory.value
        log_p, log_q = both.log_softmax(both.log_p / temperature), both.log_softmax(both.log_q / temperature)
        divergence = both.expect(log_p.exp(), log_p - log_q)
        if view.log_q.requires_grad:
            with torch.no_grad():
                slope = _slope(both, log_p.exp(), log_q.exp(), divergence, temperature)
                self.memory.add(torch.stack([slope.sum(), slope.new_tensor(slope.shape[0])]))
        return temperature**2 * divergence


def _slope(
    both: CacheView, p: torch.Tensor, q: torch.Tensor, divergence: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`d(T^2 KL) / dT [M]`; `p`, `q [M, K+1]` are the two distributions at T."""
    gap = both.log_p - both.log_q
    spread = both.expect(p, both.log_p * gap) - both.expect(p, both.log_p) * both.expect(p, gap)
    return 2 * temperature * divergence - (
        spread / temperature + both.expect(q, both.log_q) - both.expect(p, both.log_q)
    )
