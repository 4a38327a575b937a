"""Reads rows of sealed datasets by reference.

The order of rows needs the row groups and lengths of all shards: these come from the index of each shard, which one
process of a machine makes. A process reads the frames of its own rows only, and of their row groups the plain columns.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from cachetools import LRUCache

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import ShardDamaged
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.shard import ShardFile, ShardIndex
from coldstill.storage_schema.shard.reader import BatchRows
from coldstill.storage_schema.store import Store

from .images import Placed
from .media import MediaCache, MediaReader
from .prefetch import DaemonExecutor
from .shard_cache import ShardCache, Stamp, stamp_of
from .subsample import with_fewer_draws

_GROUPS_IN_MEMORY = 12
"""Plain columns of row groups, per dataset: of those of a window and those that pending rows come from."""
_OPEN_FILES = 8
_INDICES_IN_MEMORY = 32
"""About 100 bytes per row each."""
_DOWNLOADS = 4
"""Shards that a process copies at once: one alone does not fill the connection to an object store. Local shards are
verified one at a time, because the processor limits that."""


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
    position, all if None. `cache`: copies of remote shards, `media_cache`: of remote media. `without_images`: rows that
    have media are passed over. `counts`: the rows of each dataset that are used. `partners`: further datasets with the
    rows of the only one in `datasets`, one for each other teacher of an ensemble; `shares`: of all its teachers, in
    that order, with the sum 1. `verified`: per dataset, the partners last, the stamps of the local shards that were
    verified.
    """

    datasets: Sequence[Dataset]
    weights: Sequence[float]
    top_k: int | None
    draws: int | None
    cache: ShardCache
    media_cache: MediaCache
    without_images: bool
    counts: Sequence[int]
    partners: Sequence[Dataset] = ()
    shares: Sequence[float] = ()
    verified: Sequence[dict[int, Stamp]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verified", tuple({} for _ in (*self.datasets, *self.partners)))

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.counts)

    def reader(self) -> RowReader:
        """A reader for the calling thread. Close it after use."""
        return RowReader(
            self.datasets,
            partners=self.partners,
            cache=self.cache,
            media_cache=self.media_cache,
            without_images=self.without_images,
            verified=self.verified,
        )

    def read(self, reader: RowReader, wanted: Sequence[RowReference], *, seed: int) -> list[CachedRow]:
        """`wanted` rows with a subset of `draws` draws, chosen by `seed`. Raises what `RowReader.rows` raises."""
        rows = reader.rows(wanted)
        if self.draws is None:
            return rows
        taken = [reader.datasets[reference.dataset].header.draws for reference in wanted]
        return [
            with_fewer_draws(row, taken=most, wanted=self.draws, seed=seed) if self.draws < most else row
            for row, most in zip(rows, taken, strict=True)
        ]


class RowReader:
    """Rows of several datasets, for one thread of one process. `partners`, which have the rows of the first dataset,
    are numbered after the others."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        partners: Sequence[Dataset] = (),
        cache: ShardCache,
        media_cache: MediaCache,
        without_images: bool,
        verified: Sequence[dict[int, Stamp]],
    ):
        self._partners = range(len(datasets), len(datasets) + len(partners))
        datasets = (*datasets, *partners)
        self.datasets, self._without_images = datasets, without_images
        self._shards = [
            LocalShards(dataset, cache=cache, verified=known) for dataset, known in zip(datasets, verified, strict=True)
        ]
        self._media = [
            MediaReader(dataset, shards.store, cache=media_cache)
            for dataset, shards in zip(datasets, self._shards, strict=True)
        ]
        self._groups: LRUCache[tuple[int, int, int], pa.RecordBatch] = LRUCache(_GROUPS_IN_MEMORY * len(datasets))

    def prefetch(self, dataset: int, shards: Iterable[int]) -> None:
        """Prepare the `shards` that are read next in the background."""
        shards = list(shards)
        self._shards[dataset].prefetch(shards)
        for partner in self._partners:
            self._shards[partner].prefetch(dict.fromkeys(one for shard in shards for one in self._same(shard, partner)))

    def number_of(self, row: RowReference) -> int:
        """The number of `row` in its dataset. Raises what `rows` raises."""
        inside = self._shards[row.dataset].index(row.shard).rows_of(row.group).start + row.row
        return self.datasets[row.dataset].first_row(row.shard) + inside

    def reference(self, dataset: int, number: int) -> RowReference:
        """Row number `number` of a dataset, which has that many rows. Raises what `rows` raises."""
        shard = self._shard_of(dataset, number)
        index = self._shards[dataset].index(shard)
        inside = number - self.datasets[dataset].first_row(shard)
        starts = np.cumsum(index.group_rows) - index.group_rows
        group = int(np.searchsorted(starts, inside, "right")) - 1
        return RowReference(dataset, shard, group, inside - int(starts[group]), int(index.lengths[inside]))

    def groups(self, dataset: int, shard: int) -> int:
        """Row groups of a shard. Raises what `rows` raises."""
        return len(self._shards[dataset].index(shard).group_rows)

    def lengths(self, dataset: int, shard: int, group: int) -> np.ndarray:
        """`int32 [rows]`: tokens of each row of a group. Raises what `rows` raises."""
        index = self._shards[dataset].index(shard)
        return index.lengths[index.rows_of(group)]

    def numbers(self, dataset: int, shard: int, group: int) -> np.ndarray:
        """`int64 [rows]`: the rows of a group that are used, by their place in it. Raises what `rows` raises."""
        images = self.images(dataset, shard, group)
        return np.flatnonzero(images == 0) if self._without_images else np.arange(images.size)

    def images(self, dataset: int, shard: int, group: int) -> np.ndarray:
        """`int32 [rows]`: images of each row of a group. Raises what `rows` raises."""
        index = self._shards[dataset].index(shard)
        return index.media[index.rows_of(group)]

    def placed(self, wanted: Sequence[RowReference], rows: Sequence[CachedRow]) -> list[Placed]:
        """`rows`, which are those of `wanted`, with the place where their media are."""
        return [
            Placed(row, self.datasets[one.dataset].store.url, self._media[one.dataset].content)
            for one, row in zip(wanted, rows, strict=True)
        ]

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

    def _shard_of(self, dataset: int, number: int) -> int:
        # Empty shards begin at the number of the next row, which the last of them all has.
        found = self.datasets[dataset]
        return bisect_right(range(len(found.shards)), number, key=found.first_row) - 1

    def _same(self, shard: int, partner: int) -> range:
        """The shards of a partner that have the rows of `shard` of the first dataset."""
        first, rows = self.datasets[0].first_row(shard), self.datasets[0].shards[shard].rows
        return range(self._shard_of(partner, first), self._shard_of(partner, first + max(rows, 1) - 1) + 1)

    def _decoded(self, group: tuple[int, int, int], wanted: Sequence[RowReference]) -> list[CachedRow]:
        """Rows of one row group. Neighbors in `wanted` are decoded together."""
        dataset, shard, number = group
        file = self._shards[dataset].open(shard)
        if group not in self._groups:
            self._groups[group] = file.parquet.plain_batch(number)
        chosen = [reference.row for reference in wanted]
        plain = self._groups[group].take(pa.array(chosen, pa.int32()))
        batch = BatchRows(plain, self.datasets[dataset].codec, frames=file.frames(number, chosen))
        rows: list[CachedRow] = []
        while len(rows) < len(wanted):
            try:
                rows += batch.some(len(rows))
            except ColdstillError as error:
                name = self.datasets[dataset].shards[shard].file.name
                raise error.at(f"{name}, row {wanted[len(rows)].row} of row group {number}") from None
        return rows


@dataclass(frozen=True)
class OpenShard:
    """An open shard. `stamp`: of a local dataset's file when it was verified; None for a copy in the cache."""

    source: BinaryIO
    parquet: ShardFile
    index: ShardIndex
    stamp: Stamp | None
    where: str

    def frames(self, group: int, rows: Sequence[int]) -> list[Mapping[str, memoryview]]:
        """The frames of `rows` of a row group. Raises `ShardDamaged`."""
        first = self.index.rows_of(group).start
        return self.index.read_frames(self.source.fileno(), [first + row for row in rows], where=self.where)


class LocalShards:
    """Shards of one dataset as open local files, for one thread of one process.

    Shards of a local dataset are read in place, those of a remote one from copies in `cache`. `verified` holds the
    stamps of local shards that were verified; it grows.
    """

    def __init__(self, dataset: Dataset, *, cache: ShardCache, verified: dict[int, Stamp]):
        # Clients of remote stores do not survive a fork: each loader worker needs its own.
        self.store = dataset.store if dataset.store.is_local else Store(dataset.store.url)
        self._dataset, self._cache, self._verified = dataset, cache, verified
        self._executor = DaemonExecutor(1 if self.store.is_local else _DOWNLOADS)
        self._prefetched: dict[int, Future[ShardIndex]] = {}
        self._indices: LRUCache[int, ShardIndex] = LRUCache(_INDICES_IN_MEMORY)
        self._open: LRUCache[int, OpenShard] = LRUCache(_OPEN_FILES)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Copy or verify the `shards` that are opened next, and make their indices, in the background."""
        self._prefetched = {shard: self._prefetched.get(shard) or self._submit(shard) for shard in shards}

    def index(self, shard: int) -> ShardIndex:
        """The index of shard number `shard`; the shard itself is only needed if no process made the index yet.

        Raises what `open` raises.
        """
        if shard not in self._indices:
            record = self._dataset.shards[shard]
            found = self._cache.index(record.file, rows=record.rows)
            if found is None:
                future = self._prefetched.get(shard)
                found = future.result() if future else self._prepare(shard)
            self._indices[shard] = found
        return self._indices[shard]

    def open(self, shard: int) -> OpenShard:
        """Shard number `shard`; a local file that has changed since is verified again.

        Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StorageFailed`.
        """
        opened = self._open.get(shard)
        if opened is None or (opened.stamp is not None and stamp_of(opened.source.fileno()) != opened.stamp):
            future = self._prefetched.get(shard)
            if future is not None:
                future.result()
            source, stamp = self._opened(shard)
            file = self._parquet(shard, source)
            name = self._dataset.shards[shard].file.name
            opened = self._open[shard] = OpenShard(source, file, self.index(shard), stamp, f"{self.store.url}/{name}")
        return opened

    def close(self) -> None:
        """End the background threads."""
        self._executor.close()

    def _submit(self, shard: int) -> Future[ShardIndex]:
        return self._executor.submit(lambda: self._prepare(shard))

    def _prepare(self, shard: int) -> ShardIndex:
        record = self._dataset.shards[shard]
        source, _ = self._opened(shard)
        with source:
            found = self._cache.index(record.file, rows=record.rows)
            if found is not None:
                return found
            return self._cache.make_index(
                record.file, rows=record.rows, make=lambda: ShardIndex.of(self._parquet(shard, source))
            )

    def _parquet(self, shard: int, source: BinaryIO) -> ShardFile:
        record = self._dataset.shards[shard]
        native = pa.PythonFile(source, mode="r")
        file = ShardFile(native, size=record.file.bytes, codec=self._dataset.codec, where=record.file.name)
        if len(file) != record.rows:
            raise ShardDamaged(f"{record.file.name}: rows", found=len(file), wanted=record.rows)
        return file

    def _opened(self, shard: int) -> tuple[BinaryIO, Stamp | None]:
        """The file of a shard, verified by this machine."""
        file = self._dataset.shards[shard].file
        if not self.store.is_local:
            return self._cache.open(self.store, file), None
        source, stamp = self._cache.open_verified(self.store, file, known=self._verified.get(shard))
        self._verified[shard] = stamp
        return source, stamp
