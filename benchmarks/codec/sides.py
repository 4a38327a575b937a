"""Measures bytes, CPU time and KL of codecs, and checks their guarantees.

A `Side` is one codec on one set of rows, which were narrowed to what a capture keeps. `measure` runs many sides in
turn.

Shape letters: `N` target positions of a row, `K` kept ids, `D` draws.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks.codec.fidelity import Kept, buckets, kl_nats, same_sets
from benchmarks.inputs.small_language_model import VOCABULARY
from benchmarks.inputs.teacher_rows import Limits
from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.rows import CachedRow, TeacherTargets

MASS_TOLERANCE = 1e-5
"""Error of a decoded mass in float32: 128 values with relative error 6e-8, and the rounding of a log."""


class GuaranteeBroken(ColdstillError):
    """A side lost more than its header promises: KL, ids, draws or mass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """The rows to store, and the limits to which they were narrowed."""

    sharpness: str
    limits: Limits
    rows: Sequence[CachedRow]

    @property
    def positions(self) -> int:
        """Number of target positions of all rows."""
        return sum(row.targets.positions for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One codec on one case: `decode(encode())` yields the rows' targets one by one."""

    name: str
    case: Case
    encode: Callable[[], Any]
    decode: Callable[[Any], Iterator[Kept]]
    sizes: Callable[[Any], dict[str, int]]
    mean_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of the tables: bytes per target by stream, targets/s of each round, KL in nats."""

    side: Side
    streams: dict[str, float]
    kl: np.ndarray
    encode_rates: list[float] = field(default_factory=list)
    decode_rates: list[float] = field(default_factory=list)

    @property
    def bytes_per_target(self) -> float:
        """Bytes per target of all streams together."""
        return sum(self.streams.values())


def measure(sides: Sequence[Side], *, rounds: int) -> list[Measured]:
    """Run each side once for bytes and KL, then `rounds` times in turn for CPU time of the process.

    Raises `GuaranteeBroken` if a side breaks its guarantee.
    """
    encoded = [side.encode() for side in sides]
    lines = [_checked(side, data) for side, data in zip(sides, encoded, strict=True)]
    for _ in range(rounds):
        for line, data in zip(lines, encoded, strict=True):
            positions = line.side.case.positions
            line.encode_rates.append(positions / _seconds(line.side.encode))
            line.decode_rates.append(positions / _seconds(partial(_decode_all, line.side, data)))
    return lines


def _checked(side: Side, data: Any) -> Measured:
    case = side.case
    divergences = []
    for row, stored in zip(case.rows, side.decode(data), strict=True):
        if not same_sets(row.targets, stored):
            raise GuaranteeBroken(
                f"{_where(side)}: kept ids of row {row.sample_id!r}", found="other ids than were stored"
            )
        if side.mean_kl is not None:
            _require_mass(side, stored)
            _require_draws(side, row.targets, stored)
        divergences.append(kl_nats(buckets(row.targets), buckets(stored)))
    kl = np.concatenate(divergences)
    if side.mean_kl is not None and not kl.mean() < side.mean_kl:
        raise GuaranteeBroken(f"{_where(side)}: mean KL", found=f"{kl.mean():.3e}", wanted=f"below {side.mean_kl:.0e}")
    streams = {name: size / case.positions for name, size in side.sizes(data).items()}
    return Measured(side=side, streams=streams, kl=kl)


def _require_mass(side: Side, stored: Kept) -> None:
    worst = float(np.abs(np.exp(buckets(stored)).sum(1) - 1).max())
    if not worst < MASS_TOLERANCE:
        raise GuaranteeBroken(
            f"{_where(side)}: decoded mass", found=f"1 +- {worst:.1e}", wanted=f"within {MASS_TOLERANCE}"
        )


def _require_draws(side: Side, exact: TeacherTargets, stored: Any) -> None:
    """Every position must have the same draws, in any order."""

    def ordered(targets: Any) -> np.ndarray:
        owner = np.repeat(np.arange(targets.positions), targets.draw_counts)
        return np.sort(owner * np.int64(VOCABULARY) + targets.draw_ids)

    if not np.array_equal(ordered(exact), ordered(stored)):
        raise GuaranteeBroken(f"{_where(side)}: draws", found="other draws than were stored")


def _where(side: Side) -> str:
    limits = side.case.limits
    return f"{side.name}, {side.case.sharpness}, K={limits.top_k}, floor {limits.min_prob:g}, D={limits.draws}"


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _decode_all(side: Side, data: Any) -> None:
    deque(side.decode(data), maxlen=0)
