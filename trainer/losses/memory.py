"""What a loss remembers between optimizer steps: sums over target positions come in, state for the checkpoint goes out.

A loss that needs more than its batch (the mean of the step before, a temperature it trains) holds a `LossMemory`. A
CALL WITH A VIEW THAT IS DIFFERENTIATED adds to it; evaluation, whose views carry no gradient, leaves it alone. The
training loop closes each optimizer step:

    sums = all_reduce(memory.take())                                    # every device, sum
    memory.update(sums.tolist(), step=..., total_steps=...)             # the same numbers on every device

So what a loss remembers depends neither on chunks nor on micro-batches nor on devices, as t of TAID.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch


class LossMemory(ABC):
    """Sums of the step under way, and what was made of those of the steps before."""

    def __init__(self, sums: int):
        """`sums`: how many numbers are added up."""
        self._width = sums
        self.reset()

    def reset(self) -> None:
        """Back to the state before the first step."""
        self._sums: torch.Tensor | None = None
        self.load_state_dict(self.initial_state())

    def add(self, sums: torch.Tensor) -> None:
        """Take `sums`, one-dimensional, over the positions of one call; no synchronisation with a GPU."""
        sums = sums.detach().double()
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> torch.Tensor:
        """`float64` sums since the last call of this, of this device; zeros on the CPU where it saw no position."""
        sums, self._sums = self._sums, None
        return torch.zeros(self._width, dtype=torch.float64) if sums is None else sums

    @abstractmethod
    def initial_state(self) -> dict[str, Any]:
        """`state_dict` before the first step."""

    @abstractmethod
    def update(self, sums: Sequence[float], *, step: int, total_steps: int) -> None:
        """Close optimizer step number `step` (1 is the first) of `total_steps` with the sums of all devices."""

    @abstractmethod
    def logs(self) -> dict[str, float]:
        """Entries for the training log."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, fit for JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
