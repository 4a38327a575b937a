"""One unit of a new dataset: its line in the plan in, the bytes of its files and their counts out. No frame is opened.

Where a whole shard is taken and the header stays, the shard's file stays, byte for byte. Elsewhere row groups are
copied as Arrow record batches; small ones are put together up to the bounds of the format.
Shape letters: `T` tokens of a row, `N` its target positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coldstill.storage_schema.errors import CommitDamaged, InvalidRow
from coldstill.storage_schema.faithfulness import ExactPosition
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.plan import PLAN_NAME, Unit
from coldstill.storage_schema.shard import copy_shard
from coldstill.storage_schema.shard.layout import MAX_GROUP_BYTES, MAX_GROUP_ROWS

from .selecting import MaskedBatch, Select, masked_batches
from .sources import Sources, SourceShard


@dataclass
class NewUnit:
    """Unit number `unit` as far as it is made: counts, the sample's positions with their new numbers, and the media
    files that its rows refer to, as pairs (source, name). `shard` is there at the end."""

    unit: int
    shard: bytes = b""
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    sample: list[ExactPosition] = field(default_factory=list)
    media: set[tuple[int, str]] = field(default_factory=set)

    def add(self, shard: SourceShard, taken: MaskedBatch, sample: Iterable[ExactPosition]) -> pa.RecordBatch:
        """Count the taken rows of a row group, and give them. Raises `InvalidRow`."""
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
        paths = pc.unique(pc.struct_field(rows.column("media").flatten(), "path").cast(pa.binary())).drop_null()
        self.media |= {(shard.source, path.decode(errors="replace")) for path in paths.to_pylist()}
        return rows


def make_unit(sources: Sources, unit: Unit, *, header: DatasetHeader, select: Select | None) -> NewUnit:
    """The unit's shard under `header`. With `select` its rows are the first `unit.rows` that it takes from
    `unit.first_row` on; without, all rows of shard number `unit.start`.

    Raises as `Sources.open` and `Sources.sample`; raises `InvalidRow`, `ShardTooLarge`, and `CommitDamaged` for a plan
    that is not one of these sources.
    """
    made = NewUnit(unit.index)
    if unit.start >= len(sources.shards):
        raise _wrong_plan(unit)
    if select is None:
        shard = sources.shards[unit.start]
        unit = Unit(unit.index, unit.start, shard.first_row, shard.record.rows)
    if (data := _whole_shard(sources, unit, header, select, made)) is None:
        data = copy_shard(_regrouped(_taken(sources, unit, select, made)), header=header)
    made.shard = data
    if made.rows != unit.rows:
        raise _wrong_plan(unit)
    return made


def sequence_lengths(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """`int64 [rows]` tokens T and `int64 [rows]` targets N of the rows, from the plain columns. Raises `InvalidRow`."""
    tokens = pc.list_value_length(batch.column("token_ids")).to_numpy(zero_copy_only=False).astype(np.int64)
    numbers = pc.list_value_length(batch.column("target_spans")).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = batch.column("target_spans").flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    if (numbers % 2).any() or (flat[::2] < 0).any() or (flat[1::2] <= flat[::2]).any():
        raise InvalidRow("target_spans", found="a run that is no [start, stop)", wanted="pairs, 0 <= start < stop")
    ends = np.concatenate(([0], np.cumsum(flat[1::2] - flat[::2])))
    return tokens, np.diff(ends[np.concatenate(([0], np.cumsum(numbers // 2)))])


def _whole_shard(
    sources: Sources, unit: Unit, header: DatasetHeader, select: Select | None, made: NewUnit
) -> bytes | None:
    """The bytes of the unit's only shard, where they can stay."""
    shard = sources.shards[unit.start]
    if (unit.first_row, unit.rows) != (shard.first_row, shard.record.rows):
        return None
    if not sources.has_header(shard.source, header):
        return None
    data, file = sources.open(shard)
    if select is not None and not all(taken.mask.all() for taken in masked_batches(shard, file, select)):
        return None
    sample = sources.sample(shard)
    for taken in masked_batches(shard, file, None):
        made.add(shard, taken, sample)
    return data


def _taken(sources: Sources, unit: Unit, select: Select | None, made: NewUnit) -> Iterator[pa.RecordBatch]:
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


def _regrouped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows; batches that fit into one row group together are put together."""
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
        fix="remove the output and start again",
    )
