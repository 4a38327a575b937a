"""Reads rows of sealed datasets by reference; lengths need no decoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.parquet import values_of
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.shard.reader import BatchRows

from .shard_cache import LocalShards, ShardCache
from .subsample import with_fewer_draws

_GROUPS_IN_MEMORY = 12
"""Row groups per dataset, at most 8 MiB stored each: those of a window and those that pending rows come from."""


class RowReference(NamedTuple):
    """A row, by the numbers of its dataset, shard, row group and place in the row group; `length` in tokens."""

    dataset: int
    shard: int
    group: int
    row: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The datasets of a stream and how much of each is used.

    `weights`: the share of the rows that comes from each dataset, of any sum. `top_k`, `draws`: kept ids and draws per
    position, all if None. `cache`: copies of remote shards. `verified`: per dataset, the local shards that this process
    verified.
    """

    datasets: Sequence[Dataset]
    weights: Sequence[float]
    top_k: int | None
    draws: int | None
    cache: ShardCache
    verified: Sequence[set[int]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verified", tuple(set() for _ in self.datasets))

    @property
    def rows(self) -> int:
        """Rows of all datasets."""
        return sum(len(dataset) for dataset in self.datasets)

    def reader(self) -> RowReader:
        """A reader for the calling thread. Close it after use."""
        return RowReader(self.datasets, cache=self.cache, verified=self.verified)

    def read(self, reader: RowReader, wanted: Sequence[RowReference], *, seed: int) -> list[CachedRow]:
        """`wanted` rows with a subset of `draws` draws, chosen by `seed`. Raises what `RowReader.rows` raises."""
        rows = reader.rows(wanted)
        if self.draws is None:
            return rows
        taken = [self.datasets[reference.dataset].header.draws for reference in wanted]
        return [
            with_fewer_draws(row, taken=most, wanted=self.draws, seed=seed) if self.draws < most else row
            for row, most in zip(rows, taken, strict=True)
        ]


class RowReader:
    """Rows of several datasets, for one thread of one process."""

    def __init__(self, datasets: Sequence[Dataset], *, cache: ShardCache, verified: Sequence[set[int]]):
        self.datasets = datasets
        self._shards = [
            LocalShards(dataset, cache=cache, verified=known) for dataset, known in zip(datasets, verified, strict=True)
        ]
        self._groups: LRUCache[tuple[int, int, int], pa.RecordBatch] = LRUCache(_GROUPS_IN_MEMORY * len(datasets))

    def prefetch(self, dataset: int, shards: Iterable[int]) -> None:
        """Prepare the `shards` that are read next in the background."""
        self._shards[dataset].prefetch(shards)

    def groups(self, dataset: int, shard: int) -> int:
        """Row groups of a shard. Raises what `rows` raises."""
        return len(self._shards[dataset].open(shard).group_rows)

    def lengths(self, dataset: int, shard: int, group: int) -> np.ndarray:
        """`int32 [rows]`: tokens of each row of a group, read without decoding a frame. Raises what `rows` raises."""
        offsets = self._group((dataset, shard, group)).column("token_ids").offsets
        return np.diff(values_of(offsets, np.int32))

    def rows(self, wanted: Sequence[RowReference]) -> list[CachedRow]:
        """The rows of `wanted`, in that order.

        Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`, `StorageFailed`.
        """
        places: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for place, reference in enumerate(wanted):
            places[reference[:3]].append(place)
        found: dict[int, CachedRow] = {}
        for group, members in places.items():
            found.update(zip(members, self._decoded(group, [wanted[place] for place in members]), strict=True))
        return [found[place] for place in range(len(wanted))]

    def close(self) -> None:
        """End the background threads."""
        for shards in self._shards:
            shards.close()

    def _decoded(self, group: tuple[int, int, int], wanted: Sequence[RowReference]) -> list[CachedRow]:
        """Rows of one row group. Neighbors in `wanted` are decoded together."""
        dataset, shard, number = group
        chosen = pa.array([reference.row for reference in wanted], pa.int32())
        batch = BatchRows(self._group(group).take(chosen), self.datasets[dataset].codec)
        rows: list[CachedRow] = []
        while len(rows) < len(wanted):
            try:
                rows += batch.some(len(rows))
            except ColdstillError as error:
                name = self.datasets[dataset].shards[shard].file.name
                raise error.at(f"{name}, row {wanted[len(rows)].row} of row group {number}") from None
        return rows

    def _group(self, group: tuple[int, int, int]) -> pa.RecordBatch:
        if group not in self._groups:
            dataset, shard, number = group
            self._groups[group] = self._shards[dataset].open(shard).batch(number)
        return self._groups[group]
