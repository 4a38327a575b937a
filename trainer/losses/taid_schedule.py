"""How t of TAID moves, once per optimizer step, from the mean loss of that step.

The rule of the paper (arXiv 2501.16937, section 3 and the official code):

    delta = (J_prev - J) / J_prev,    m = beta m + (1 - beta) delta,    line = t_start + (t_end - t_start) step / total
    t = min(t_end, max(line, t + alpha sigmoid(m) (1 - t)))

The official code instead updates per micro-batch and per device, from the local loss, and in validation too. There t
depends on how a batch is split and on how often the student is evaluated; here it does not.
"""

from __future__ import annotations

import math
from typing import Any, Literal

PAPER_ALPHA_TIMES_STEPS = 5.8
"""alpha * steps of the paper's runs (5e-4 over about 11,700 steps). As sigmoid(m) stays near 1/2, the course of
`1 - (1 - t_start) exp(-alpha n / 2)` depends on this product only. At a fixed alpha of 5e-4 the adaptive part would
stay below the straight line in every run of up to 4,000 steps."""

LARGEST_AUTO_ALPHA = 0.1
"""Below 58 steps `auto` stops growing: one update covers at most about a twentieth of the remaining way, and a run of a
few steps follows the line instead of jumping to the teacher."""


class TaidSchedule:
    """`t` (for the next step), `momentum` and `previous_loss`: all that TAID keeps between steps."""

    def __init__(
        self,
        *,
        kind: Literal["adaptive", "linear"] = "adaptive",
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float | Literal["auto"] = "auto",
        beta: float = 0.99,
    ):
        self.kind, self.t_start, self.t_end, self.alpha, self.beta = kind, t_start, t_end, alpha, beta
        self.reset()

    def reset(self) -> None:
        """Back to the state before the first step."""
        self.t = self.t_start
        self.momentum = 0.0
        self.previous_loss: float | None = None

    def update(self, loss: float | None, *, step: int, total_steps: int) -> float:
        """Take the mean loss of optimizer step number `step` (1 is the first) of `total_steps`; return the new t.

        The adaptive rule needs two losses: its first call only stores one. t never falls. A step without any target
        has the loss None, and t only keeps up with the line.
        """
        line = self.t_start + (self.t_end - self.t_start) * min(1.0, step / total_steps)
        if self.kind == "linear" or loss is None:
            self.t = max(self.t, line)
        elif self.previous_loss is not None:
            self.momentum = self.beta * self.momentum + (1 - self.beta) * self._relative_fall(loss)
            pace = self._alpha(total_steps) / (1 + math.exp(-self.momentum))
            self.t = min(self.t_end, max(line, self.t + pace * (1 - self.t)))
        if loss is not None:
            self.previous_loss = loss
        return self.t

    def _relative_fall(self, loss: float) -> float:
        # Bounded: at t_start = 0 the first loss is 0, and one huge ratio would disable the rule for thousands of steps.
        assert self.previous_loss is not None
        return max(-1.0, min(1.0, (self.previous_loss - loss) / (abs(self.previous_loss) + 1e-15)))

    def _alpha(self, total_steps: int) -> float:
        if self.alpha == "auto":
            return min(LARGEST_AUTO_ALPHA, PAPER_ALPHA_TIMES_STEPS / total_steps)
        return float(self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON types."""
        return {"t": self.t, "momentum": self.momentum, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.t, self.momentum, self.previous_loss = state["t"], state["momentum"], state["previous_loss"]
