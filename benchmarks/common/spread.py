"""Median and quartiles of the rounds of a benchmark, and the verdict against a goal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Spread(NamedTuple):
    """Median and quartiles; of fewer than three values the first one, the least and the greatest."""

    middle: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Of the values of all rounds."""
    found = list(values)
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 2 else (min(found), found[0], max(found))
    return Spread(middle, low, high)


def ratio(over: Iterable[float], under: Iterable[float]) -> Spread:
    """Of the rounds' own ratios: both sides of a round had the same load."""
    return spread(a / b for a, b in zip(over, under, strict=True))


def verdict(found: Spread, goal: float, *, is_limit: bool = False) -> str:
    """Whether the median reaches `goal`, or with `is_limit` stays below it. None if the quartiles enclose the goal."""
    if found.low <= goal <= found.high and found.low < found.high:
        return f"no verdict: the quartiles {found.low:,.3f} to {found.high:,.3f} enclose the goal {goal:,}"
    return f"reaches {goal:,}" if (found.middle <= goal if is_limit else found.middle >= goal) else f"misses {goal:,}"
