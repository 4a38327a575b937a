"""The companded grid of log-probs: fine where probability is high. Converts log-probs to levels and back.

`level(x) = floor(a (1 - exp(-x / 2)) + b x + 1/2)` with `x = -logprob` in nats: the step between levels is
`1 / ((a / 2) exp(-x / 2) + b)`. The KL that rounding costs is about `sum p step^2 / 24`; a step in proportion to
`p^-1/2` adds the same to every entry, and `b` bounds the step where p is close to 0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from coldstill.storage_schema.rows import LOG_FLOOR

_BISECTIONS = 60
"""Halvings of [0, -LOG_FLOOR]: enough for the last bit of a double."""


class Grid:
    """The grid with parameters `a >= 0` and `b >= 1`. Values below `LOG_FLOOR` are stored as `LOG_FLOOR`."""

    def __init__(self, a: int, b: int):
        self.a, self.b = a, b
        self.logprobs = level_logprobs(a, b)
        """`float32 [levels]`: the log-prob of each level, descending."""

    @property
    def top(self) -> int:
        """The highest level: that of `LOG_FLOOR`."""
        return self.logprobs.size - 1

    def levels(self, logprobs: np.ndarray) -> np.ndarray:
        """`uint16`, shaped as `logprobs` (natural logs, at most 0; -inf is stored as `LOG_FLOOR`)."""
        x = np.minimum(-np.asarray(logprobs, np.float64), -LOG_FLOOR)
        np.maximum(x, 0.0, out=x)
        return np.floor(self.a * -np.expm1(-x / 2) + self.b * x + 0.5).astype(np.uint16)

    def step(self, logprobs: np.ndarray) -> np.ndarray:
        """`float64`, shaped as `logprobs`: the distance in nats between neighboring levels there."""
        return 1 / (self.a / 2 * np.exp(np.asarray(logprobs, np.float64) / 2) + self.b)


def top_level(a: int, b: int) -> int:
    """The level of `LOG_FLOOR`."""
    return int(np.floor(a * -np.expm1(LOG_FLOOR / 2) - b * LOG_FLOOR + 0.5))


@lru_cache(maxsize=16)
def level_logprobs(a: int, b: int) -> np.ndarray:
    """`float32 [levels]`: minus the `x` in `[0, -LOG_FLOOR]` with `a (1 - exp(-x / 2)) + b x = level`."""
    levels = np.arange(top_level(a, b) + 1, dtype=np.float64)
    low, high = np.zeros_like(levels), np.full_like(levels, -LOG_FLOOR)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = a * -np.expm1(-middle / 2) + b * middle < levels
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    table = (-high).astype(np.float32)
    table[0] = 0.0
    table.flags.writeable = False
    return table
