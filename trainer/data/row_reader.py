"""Rows by reference: what a row group holds is looked up by lengths alone, rows are decoded when a batch wants them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.parquet import values_of
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.shard.reader import BatchRows

from .local_shards import LocalShards
from .shard_cache import ShardCache

_GROUPS_IN_MEMORY = 12
"""Of each dataset, stored bytes of at most 8 MiB each: those of a window, and those that pending rows come from."""


class RowReference(NamedTuple):
    """Which row: numbers of its dataset, of the shard there, of the row group there, of the row there. `length`:
    tokens."""

    dataset: int
    shard: int
    group: int
    row: int
    length: int


class RowReader:
    """Rows of some datasets, for one thread of one process."""

    def __init__(self, datasets: Sequence[Dataset], *, cache: ShardCache, verified: Sequence[set[int]]):
        self.datasets = datasets
        self._shards = [
            LocalShards(dataset, cache=cache, verified=known) for dataset, known in zip(datasets, verified, strict=True)
        ]
        self._groups: LRUCache[tuple[int, int, int], pa.RecordBatch] = LRUCache(_GROUPS_IN_MEMORY * len(datasets))

    def expect(self, dataset: int, shards: Iterable[int]) -> None:
        """These shards are read next: make them ready in the background."""
        self._shards[dataset].expect(shards)

    def groups(self, dataset: int, shard: int) -> int:
        """Row groups of a shard. Raises as `rows`."""
        return len(self._shards[dataset].open(shard).group_rows)

    def lengths(self, dataset: int, shard: int, group: int) -> np.ndarray:
        """`int32 [rows]`: tokens of each row of a row group; no frame is opened. Raises as `rows`."""
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
        """Rows of one row group; neighbours in `wanted` are decoded together."""
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
        batch = self._groups.get(group)
        if batch is None:
            dataset, shard, number = group
            batch = self._groups[group] = self._shards[dataset].open(shard).batch(number)
        return batch
