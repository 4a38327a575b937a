"""The sides of the quality benchmark, which of their runs are missing, and what a share is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.run_log import lines_of
from benchmarks.quality.runs import Cache, Side

TEACHERS = {"as trained": 1.0, "sharpened": 0.512}
"""Divisor of the teacher's logits."""
PLAIN, DENSE_KL, DENSE = Side("plain fine-tuning"), Side("dense forward KL"), Side("dense TAID")
CACHED = [Side(f"K={k}, D={d}", Cache(k, d)) for k in (8, 16, 32) for d in (0, 32, 64)]
MORE_DRAWS = Side("K=16, D=256, all kept", Cache(16, 256, kept_draws=256))
RENORMALIZED = Side("K=16, renormalised", Cache(16, 0), renormalize=True)
SIDES = [PLAIN, DENSE_KL, DENSE, *CACHED, MORE_DRAWS, RENORMALIZED]
QUICK_SIDES = [PLAIN, DENSE, Side("K=16, D=0", Cache(16, 0)), Side("K=16, D=64", Cache(16, 64))]


@dataclass(frozen=True)
class Run:
    """One training run: its teacher, order of rows and side."""

    teacher: str
    seed: int
    side: str


def found(log: Path) -> dict[Run, float]:
    """Held-out KL of each run in the log."""
    return {Run(r["teacher"], r["seed"], r["side"]): r["kl"] for r in lines_of(log)}


def missing(
    sides: list[Side], *, seeds: int, teachers: list[str], done: dict[Run, float]
) -> Iterator[tuple[Run, Side]]:
    """Yield the runs that are not done; sides take turns within a seed."""
    for seed in range(seeds):
        for teacher in teachers:
            for side in sides:
                run = Run(teacher, seed, side.name)
                if run not in done:
                    yield run, side


def shares(kl: Callable[[str], list[float]], sides: list[Side]) -> dict[str, list[float]]:
    """Side -> its share of dense TAID's gain over plain fine-tuning, for each seed."""
    gains = [plain - dense for plain, dense in zip(kl(PLAIN.name), kl(DENSE.name), strict=True)]
    return {
        side.name: [
            (plain - value) / gain for plain, value, gain in zip(kl(PLAIN.name), kl(side.name), gains, strict=True)
        ]
        for side in sides
    }
