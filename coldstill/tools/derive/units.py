"""Plans and makes the units of a new dataset from rows of its sources.

A unit takes consecutive selected rows of the sources. In the plan, `start` is the number of its first source shard,
`first_row` the number of its first row among all source rows, and `rows` how many rows it takes.

A shard that is taken whole becomes its own unit, so that its file can be copied byte for byte. Other shards are joined
in order, up to `rows_per_unit` of the header and `JOINED_BYTES`: a hundredth of each of 10,000 shards does not become
10,000 nearly empty shards. No codec frame is decoded: row groups are copied as Arrow record batches, and small ones are
joined up to the limits of the format.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldstill.common.errors import ColdstillError
from coldstill.common.progress import tqdm
from coldstill.storage_schema.errors import CommitDamaged, InvalidRow
from coldstill.storage_schema.faithfulness import ExactPosition
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.media import media_paths
from coldstill.storage_schema.plan import PLAN_NAME, Unit
from coldstill.storage_schema.shard import ShardFile, copy_shard
from coldstill.storage_schema.shard.layout import MAX_GROUP_BYTES, MAX_GROUP_ROWS

from .sources import Sources, SourceShard

JOINED_BYTES = 128 << 20
"""Maximum bytes of the joined rows of a unit, before compression."""

Select = Callable[[pa.RecordBatch], np.ndarray]
"""Returns which rows of a row group to take, as `bool [rows]`. No frame is decoded."""


class MaskedBatch(NamedTuple):
    """A row group, the number of its first row in its shard, and which of its rows are taken (`bool [rows]`)."""

    first: int
    batch: pa.RecordBatch
    mask: np.ndarray


class _TakenRows(NamedTuple):
    """Rows taken from a shard: its number, the number of the first among all source rows, how many, their bytes."""

    shard: int
    first_row: int
    rows: int
    bytes: int


def masked_batches(shard: SourceShard, file: ShardFile, select: Select | None) -> Iterator[MaskedBatch]:
    """The row groups of a shard and the rows that `select` takes (None: all). Raises what `ShardFile.batch` raises."""
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
    """The units of each selection among the source rows `rows`, at most `limit` rows each. Each shard is read once.

    Raises what `Sources.open` raises.
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
) -> list[_TakenRows]:
    _, file = sources.open(shard)
    taken = [_TakenRows(number, 0, 0, 0)] * len(selections)
    for first, batch in _batches(file):
        for index, select in enumerate(selections):
            before = taken[index]
            numbers = shard.first_row + first + np.flatnonzero(_mask(shard, batch, select))
            numbers = numbers[(numbers >= rows.start) & (numbers < rows.stop)][: left[index] - before.rows]
            if numbers.size:
                size = batch.take(pa.array(numbers - shard.first_row - first)).nbytes
                first_row = before.first_row if before.rows else int(numbers[0])
                taken[index] = _TakenRows(number, first_row, before.rows + numbers.size, before.bytes + size)
    return taken


class _Joiner:
    """Joins the rows taken from shards into units, by the rule in the head of this file."""

    def __init__(self, rows_per_unit: int):
        self._rows_per_unit = rows_per_unit
        self._units: list[Unit] = []
        self._open: list[_TakenRows] = []

    def add(self, taken: _TakenRows, *, whole: bool) -> None:
        """Add the rows taken from the next shard."""
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


@dataclass
class NewUnit:
    """Unit number `unit` while it is made.

    `sample`: positions of the faithfulness sample, renumbered. `media`: (source, name) of the media files that its rows
    refer to. `shard`: the bytes, set last.
    """

    unit: int
    sources: Sources
    shard: bytes = b""
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    sample: list[ExactPosition] = field(default_factory=list)
    media: set[tuple[int, str]] = field(default_factory=set)

    def add(self, shard: SourceShard, taken: MaskedBatch, sample: Iterable[ExactPosition]) -> pa.RecordBatch:
        """Add the taken rows of a row group to the counts, and return them. Raises `InvalidRow`, `FileMissing`."""
        first, batch, mask = taken
        new_numbers = self.rows + np.cumsum(mask) - 1
        for position in sample:
            if 0 <= (row := position.row - first) < mask.size and mask[row]:
                self.sample.append(position._replace(unit=self.unit, row=int(new_numbers[row])))
        rows = batch if mask.all() else batch.filter(pa.array(mask))
        try:
            tokens, targets = sequence_lengths(rows)
        except InvalidRow as error:
            raise error.at(shard.record.file.name) from None
        self.rows += rows.num_rows
        self.tokens += int(tokens.sum())
        self.targets += int(targets.sum())
        for path in media_paths(rows):
            # Now, and not at the end: a stranger's rows can name more files than memory holds.
            self.media.add((shard.source, self.sources.media_record(shard.source, path).name))
        return rows


def make_unit(sources: Sources, unit: Unit, *, header: DatasetHeader, select: Select | None) -> NewUnit:
    """The unit's shard under `header`. With `select`, its rows are the first `unit.rows` that `select` takes from row
    `unit.first_row` on; without, they are all rows of shard number `unit.start`.

    Raises what `Sources.open` and `Sources.sample` raise, `InvalidRow`, `ShardTooLarge`, and `CommitDamaged` for a plan
    that was made for other sources.
    """
    made = NewUnit(unit.index, sources)
    if unit.start >= len(sources.shards):
        raise _wrong_plan(unit)
    if select is None:
        shard = sources.shards[unit.start]
        unit = Unit(unit.index, unit.start, shard.first_row, shard.record.rows)
    if (data := _whole_shard(sources, unit, header, select, made)) is None:
        data = copy_shard(_joined(_taken_batches(sources, unit, select, made)), header=header)
    made.shard = data
    if made.rows != unit.rows:
        raise _wrong_plan(unit)
    return made


def sequence_lengths(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the targets of each row, `int64 [rows]` each, from the plain columns. Raises `InvalidRow`."""
    tokens = pc.list_value_length(batch.column("token_ids")).to_numpy(zero_copy_only=False).astype(np.int64)
    numbers = pc.list_value_length(batch.column("target_spans")).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = batch.column("target_spans").flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    if (numbers % 2).any() or (flat[::2] < 0).any() or (flat[1::2] <= flat[::2]).any():
        raise InvalidRow("target_spans", found="a span that is not [start, stop)", wanted="pairs, 0 <= start < stop")
    ends = np.concatenate(([0], np.cumsum(flat[1::2] - flat[::2])))
    return tokens, np.diff(ends[np.concatenate(([0], np.cumsum(numbers // 2)))])


def _whole_shard(
    sources: Sources, unit: Unit, header: DatasetHeader, select: Select | None, made: NewUnit
) -> bytes | None:
    """The bytes of the unit's only shard if they can be copied as they are, else None."""
    shard = sources.shards[unit.start]
    if (unit.first_row, unit.rows) != (shard.first_row, shard.record.rows):
        return None
    data, file = sources.open(shard)
    if not header.stands_for(file.header):
        return None
    if select is not None and not all(taken.mask.all() for taken in masked_batches(shard, file, select)):
        return None
    sample = sources.sample(shard)
    for taken in masked_batches(shard, file, None):
        made.add(shard, taken, sample)
    return data


def _taken_batches(sources: Sources, unit: Unit, select: Select | None, made: NewUnit) -> Iterator[pa.RecordBatch]:
    for shard in itertools.islice(sources.shards, unit.start, None):
        if made.rows >= unit.rows:
            return
        _, file = sources.open(shard)
        sample = sources.sample(shard)
        for taken in masked_batches(shard, file, select):
            numbers = shard.first_row + taken.first + np.arange(taken.mask.size)
            mask = taken.mask & (numbers >= unit.first_row)
            mask &= np.cumsum(mask) <= unit.rows - made.rows
            if mask.any():
                yield made.add(shard, taken._replace(mask=mask), sample)


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows; consecutive batches are joined while they fit into one row group."""
    together: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if together and (rows + batch.num_rows > MAX_GROUP_ROWS or size + batch.nbytes > MAX_GROUP_BYTES):
            yield _concatenated(together)
            together, rows, size = [], 0, 0
        together.append(batch)
        rows += batch.num_rows
        size += batch.nbytes
    if together:
        yield _concatenated(together)


def _concatenated(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _wrong_plan(unit: Unit) -> CommitDamaged:
    return CommitDamaged(
        f"{PLAN_NAME}: unit {unit.index}",
        found=f"{unit.rows} rows from source row {unit.first_row} on",
        wanted="rows of the sources",
        fix="remove the output and re-run the command",
    )
