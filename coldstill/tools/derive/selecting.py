"""Which rows a new dataset takes: shards and selections in, the plan of its units out.

A unit of a new dataset is a run of taken rows of the sources. In its plan `start` is the number of the first source
shard, `first_row` the number, among all source rows, from which on rows are taken, and `rows` how many are.

The rule: a shard that is taken whole is a unit alone, so that its bytes can stay. Other shards are joined in order
while their taken rows are at most `rows_per_unit` of the header and `JOINED_BYTES`: 10,000 shards of which a hundredth
is taken do not become 10,000 shards that are nearly empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.shard import ShardFile

from .sources import Sources, SourceShard

JOINED_BYTES = 128 << 20
"""Before compression."""

Select = Callable[[pa.RecordBatch], np.ndarray]
"""A row group, frames unopened, to `bool [rows]`."""


class MaskedBatch(NamedTuple):
    """A row group whose first row is number `first` of its shard, and which of its rows are taken."""

    first: int
    batch: pa.RecordBatch
    mask: np.ndarray


class _Taken(NamedTuple):
    """What is taken of a shard: its number, the first taken row among all source rows, how many, and their bytes."""

    shard: int
    first_row: int
    rows: int
    bytes: int


def masked_batches(shard: SourceShard, file: ShardFile, select: Select | None) -> Iterator[MaskedBatch]:
    """The row groups of a shard with the rows that `select` takes; None takes all. Raises as `ShardFile.batch`."""
    for first, batch in _batches(file):
        yield MaskedBatch(first, batch, np.ones(len(batch), bool) if select is None else _mask(shard, batch, select))


def _batches(file: ShardFile) -> Iterator[tuple[int, pa.RecordBatch]]:
    first = 0
    for group, rows in enumerate(file.group_rows):
        yield first, file.batch(group)
        first += rows


def _mask(shard: SourceShard, batch: pa.RecordBatch, select: Select) -> np.ndarray:
    try:
        return select(batch)
    except ColdstillError as error:
        raise error.at(shard.record.file.name) from None


def plan_selected(
    sources: Sources,
    selections: Sequence[Select],
    *,
    rows: range,
    limit: int | None = None,
    rows_per_unit: int,
    progress: bool,
) -> list[list[Unit]]:
    """The units of each selection, of the source rows `rows`, of each at most `limit`. Every shard is read once.

    Raises as `Sources.open`.
    """
    joiners = [_Joiner(rows_per_unit) for _ in selections]
    left = [sources.rows if limit is None else limit for _ in selections]
    shards = [
        (number, shard)
        for number, shard in enumerate(sources.shards)
        if shard.first_row < rows.stop and shard.first_row + shard.record.rows > rows.start
    ]
    total = sum(shard.record.file.bytes for _, shard in shards)
    with tqdm(total=total, desc="select", unit="B", unit_scale=True, disable=not progress) as bar:
        for number, shard in shards:
            if not any(left):
                break
            for index, taken in enumerate(_scan(sources, number, shard, selections, rows, left)):
                joiners[index].add(taken, whole=taken.rows == shard.record.rows)
                left[index] -= taken.rows
            bar.update(shard.record.file.bytes)
    return [joiner.finished() for joiner in joiners]


def _scan(
    sources: Sources, number: int, shard: SourceShard, selections: Sequence[Select], rows: range, left: Sequence[int]
) -> list[_Taken]:
    _, file = sources.open(shard)
    taken = [_Taken(number, 0, 0, 0)] * len(selections)
    for first, batch in _batches(file):
        for index, select in enumerate(selections):
            before = taken[index]
            numbers = shard.first_row + first + np.flatnonzero(_mask(shard, batch, select))
            numbers = numbers[(numbers >= rows.start) & (numbers < rows.stop)][: left[index] - before.rows]
            if numbers.size:
                size = batch.take(pa.array(numbers - shard.first_row - first)).nbytes
                first_row = before.first_row if before.rows else int(numbers[0])
                taken[index] = _Taken(number, first_row, before.rows + numbers.size, before.bytes + size)
    return taken


class _Joiner:
    """Makes units of what is taken of shards, by the rule above."""

    def __init__(self, rows_per_unit: int):
        self._rows_per_unit = rows_per_unit
        self._units: list[Unit] = []
        self._open: list[_Taken] = []

    def add(self, taken: _Taken, *, whole: bool) -> None:
        """The next shard."""
        if not taken.rows:
            return
        joined = [*self._open, taken]
        too_many = sum(part.rows for part in joined) > self._rows_per_unit
        if whole or too_many or sum(part.bytes for part in joined) > JOINED_BYTES:
            self._close()
        self._open.append(taken)
        if whole:
            self._close()

    def finished(self) -> list[Unit]:
        """All units."""
        self._close()
        return self._units

    def _close(self) -> None:
        if self._open:
            first, rows = self._open[0], sum(part.rows for part in self._open)
            self._units.append(Unit(len(self._units), first.shard, first.first_row, rows))
            self._open = []
