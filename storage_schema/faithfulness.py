"""The faithfulness sample: about 1,000 target positions that are also stored without quantization.

A reader can measure the loss of precision of the codec with it. Units share the sample evenly, and a unit's positions
are spread evenly over its targets; the choice depends on nothing else.
Shape letters: `N` target positions, `K` teacher top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .errors import FileDamaged
from .parquet import list_of, required, table_from_bytes, table_to_bytes, values_of
from .rows import MASS_TOLERANCE, CachedRow, TeacherTargets

FAITHFULNESS_NAME = "faithfulness.parquet"
SAMPLE_POSITIONS = 1000
_MAX_POSITIONS = 100_000


_SCHEMA = pa.schema(
    [
        required("unit", pa.int32()),
        required("row", pa.int32()),
        required("target", pa.int32()),
        required("ids", list_of(pa.int32())),
        required("logprobs", list_of(pa.float32())),
        required("log_tail", pa.float32()),
    ]
)


class ExactPosition(NamedTuple):
    """Target number `target` of row number `row` of unit `unit`, before encoding: `ids int32 [k]`, `logprobs float32
    [k]`, and the log of the mass outside them."""

    unit: int
    row: int
    target: int
    ids: np.ndarray
    logprobs: np.ndarray
    log_tail: float


def sample_share(unit: int, *, units: int) -> int:
    """How many positions of the sample unit number `unit` of `units` contributes."""
    return (unit + 1) * SAMPLE_POSITIONS // units - unit * SAMPLE_POSITIONS // units


def take_sample(rows: Sequence[CachedRow], *, unit: int, count: int) -> list[ExactPosition]:
    """`count` positions (at most all of them), spread evenly over the targets of a unit's rows."""
    sizes = np.array([row.targets.positions for row in rows], np.int64)
    total = int(sizes.sum())
    count = min(count, total)
    starts = np.cumsum(sizes) - sizes
    taken = []
    for place in ((2 * np.arange(count) + 1) * total // (2 * max(count, 1))).tolist():
        row = int(np.searchsorted(starts, place, side="right")) - 1
        targets, target = rows[row].targets, place - int(starts[row])
        kept = int(targets.counts[target])
        taken.append(
            ExactPosition(
                unit,
                row,
                target,
                targets.ids[target, :kept],
                targets.logprobs[target, :kept],
                float(targets.log_tail[target]),
            )
        )
    return taken


def sample_to_bytes(sample: Sequence[ExactPosition]) -> bytes:
    """The sample as a Parquet file, without compression."""
    columns = {name: [getattr(position, name) for position in sample] for name in _SCHEMA.names}
    return table_to_bytes(pa.table(columns, schema=_SCHEMA))


def sample_from_bytes(data: bytes, *, where: str) -> list[ExactPosition]:
    """The positions of a sample. Raises `FileDamaged`."""
    table = table_from_bytes(data, schema=_SCHEMA, max_rows=_MAX_POSITIONS, where=where, error=FileDamaged)
    return list(_positions(table, where))


def _positions(table: pa.Table, where: str) -> Iterator[ExactPosition]:
    numbers = [table[name].to_pylist() for name in ("unit", "row", "target")]
    log_tails = values_of(table["log_tail"].combine_chunks(), np.float32)
    (starts, ids), (other, logprobs) = _lists(table["ids"], np.int32), _lists(table["logprobs"], np.float32)
    if (
        not np.array_equal(starts, other)
        or (np.diff(starts) < 1).any()
        or any(min(column, default=0) < 0 for column in numbers)
    ):
        raise FileDamaged(
            where, found="different lengths, or a negative number", wanted="as many ids as log-probs, numbers from 0 on"
        )
    logs = np.concatenate((logprobs, log_tails))
    if not (logs <= MASS_TOLERANCE).all():  # NaN is not
        raise FileDamaged(where, found=f"a log-prob of {logs.max()}", wanted="natural logs, at most 0")
    for number, (unit, row, target) in enumerate(zip(*numbers, strict=True)):
        start, stop = starts[number : number + 2]
        yield ExactPosition(unit, row, target, ids[start:stop], logprobs[start:stop], float(log_tails[number]))


def _lists(column: pa.ChunkedArray, kind: type) -> tuple[np.ndarray, np.ndarray]:
    """Offsets `[n + 1]` of the lists in their joined values; the values."""
    lists = column.combine_chunks()
    return values_of(lists.offsets, np.int32), values_of(lists.values, kind)


def storage_kl(exact: ExactPosition, stored: TeacherTargets) -> float:
    """KL(exact || stored) in nats over the kept ids and the tail of one position, in float64, both sides normalized.

    Raises `FileDamaged` if the stored ids differ.
    """
    kept = int(stored.counts[exact.target])
    ids, logprobs = stored.ids[exact.target, :kept], stored.logprobs[exact.target, :kept]
    mine, theirs = np.argsort(exact.ids, kind="stable"), np.argsort(ids, kind="stable")
    if not np.array_equal(exact.ids[mine], ids[theirs]):
        raise FileDamaged(
            f"{FAITHFULNESS_NAME}: unit {exact.unit}, row {exact.row}, target {exact.target}",
            found="other ids than the shard keeps there",
            wanted="the same ids",
        )
    p = np.append(exact.logprobs[mine], exact.log_tail).astype(np.float64)
    q = np.append(logprobs[theirs], stored.log_tail[exact.target]).astype(np.float64)
    p -= np.log(np.exp(p).sum())
    q -= np.log(np.exp(q).sum())
    weights = np.exp(p)
    return float((weights * np.where(weights > 0, p - q, 0.0)).sum())
