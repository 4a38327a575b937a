"""Measures one worker for `--dry-run --probe`: tokens per second and bytes per target.

The first sequences of the source are scored in slices of growing size until the time is up, and the slice with most
tokens is reported. So the engine's warm-up does not count, and a slow machine gets no more than it can do in the time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from coldstill.pipeline.teachers.protocol import Teacher, TokenSequence
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.shard import write_shard

_FIRST_SLICE = 8
_GROWTH = 2


class SpeedReport(NamedTuple):
    """One slice: `sequences` sent to the teacher, `tokens` and `targets` that it returned, the `seconds` that it took,
    and the `bytes` of a shard of the result."""

    sequences: int
    tokens: int
    targets: int
    seconds: float
    bytes: int


def measure_speed(
    teacher: Teacher, header: DatasetHeader, sequences: Sequence[TokenSequence], *, seconds: float
) -> SpeedReport:
    """The report of the slice with most tokens. Raises the named errors of teachers."""
    reports: list[SpeedReport] = []
    start, size, begun = 0, _FIRST_SLICE, time.monotonic()
    while start < len(sequences) and (not reports or time.monotonic() - begun < seconds):
        reports.append(_measure(teacher, header, sequences[start : start + size]))
        start, size = start + size, size * _GROWTH
    return max(reports, key=lambda report: report.tokens)


def _measure(teacher: Teacher, header: DatasetHeader, sequences: Sequence[TokenSequence]) -> SpeedReport:
    started = time.monotonic()
    scored = teacher.score(sequences)
    seconds = time.monotonic() - started
    rows = [answer.row for answer in scored]
    return SpeedReport(
        sequences=len(sequences),
        tokens=sum(row.token_ids.size for row in rows),
        targets=sum(row.targets.positions for row in rows),
        seconds=seconds,
        bytes=len(write_shard(rows, header=header)),
    )
