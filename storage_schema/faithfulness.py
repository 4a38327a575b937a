"""The faithfulness sample: about 1,000 target positions that a capture keeps unquantised too.

Whoever receives the dataset can measure with it what storage cost. Positions are spread evenly over the targets of each
unit, and units share the sample evenly; which positions they are depends on nothing else.
Shape letters: `N` target positions, `K` teacher top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from .errors import FileDamaged
from .parquet.fields import list_of, required
from .parquet.memory import values_of
from .parquet.small_tables import table_from_bytes, table_to_bytes
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
    """Target number `target` of row number `row` of unit `unit`, as the teacher gave it: `ids int32 [k]`,
    `logprobs float32 [k]`, the log of the mass outside them."""

    unit: int
    row: int
    target: int
    ids: np.ndarray
    logprobs: np.ndarray
    log_tail: float


def sample_share(unit: int, *, units: int) -> int:
    """How many positions of the sample are unit number `unit`'s, of `units`."""
    return (unit + 1) * SAMPLE_POSITIONS // units - unit * SAMPLE_POSITIONS // units


def take_sample(rows: Sequence[CachedRow], *, unit: int, count: int) -> list[ExactPosition]:
    """`count` positions (all, where there are fewer), evenly spread over the targets of a unit's rows."""
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
        raise FileDamaged(where, found="other lengths, or a negative number", wanted="as many ids as log-probs")
    logs = np.concatenate((logprobs, log_tails))
    if not (logs <= MASS_TOLERANCE).all():  # NaN is not
        raise FileDamaged(where, found=f"a log-prob of {logs.max()}", wanted="natural logs, at most 0")
    for number, (unit, row, target) in enumerate(zip(*numbers, strict=True)):
        start, stop = starts[number : number + 2]
        yield ExactPosition(unit, row, target, ids[start:stop], logprobs[start:stop], float(log_tails[number]))


def _lists(column: pa.ChunkedArray, kind: type) -> tuple[np.ndarray, np.ndarray]:
    """Where each list begins, and where the last ends, in the values of all; the values."""
    lists = column.combine_chunks()
    return values_of(lists.offsets, np.int32), values_of(lists.values, kind)


def storage_kl(exact: ExactPosition, stored: TeacherTargets) -> float:
    """KL(exact || stored) in nats over the kept ids and the tail, of the position that both are of; in float64, exact
    side normalised. Raises `FileDamaged` where other ids are stored."""
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
