"""The shards of one dataset as open files of this machine, those that come next made ready in a background thread.

Shards of a local dataset are read where they lie, verified against the manifest when they are first opened; those of a
remote one are copied into the cache, verified on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
from cachetools import LRUCache

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import ShardDamaged
from coldstill.storage_schema.shard import ShardFile
from coldstill.storage_schema.store import Store

from .background import BackgroundCalls
from .shard_cache import ShardCache

_OPEN_FILES = 8


class LocalShards:
    """For one thread of one process. `verified`: numbers of local shards whose digest was right already; grows."""

    def __init__(self, dataset: Dataset, *, cache: ShardCache, verified: set[int]):
        # Clients of remote stores do not outlive a fork: a loader worker needs one of its own.
        self._store = dataset.store if dataset.store.is_local else Store(dataset.store.url)
        self._dataset, self._cache, self._verified = dataset, cache, verified
        self._calls = BackgroundCalls()
        self._ready: dict[int, Future[Path]] = {}
        self._open: LRUCache[int, ShardFile] = LRUCache(_OPEN_FILES)

    def expect(self, shards: Iterable[int]) -> None:
        """These are opened next, in this order: make them ready in the background."""
        self._ready = {shard: self._ready.get(shard) or self._submit(shard) for shard in shards}

    def open(self, shard: int) -> ShardFile:
        """Shard number `shard`. Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StorageFailed`."""
        file = self._open.get(shard)
        if file is None:
            file = self._open[shard] = self._opened(shard)
        return file

    def close(self) -> None:
        """End the background thread."""
        self._calls.close()

    def _opened(self, shard: int) -> ShardFile:
        record = self._dataset.shards[shard]
        future = self._ready.get(shard)
        try:
            source = pa.OSFile(str(future.result() if future else self._path(shard)))
        except FileNotFoundError:  # a small cache, and another process needed the room
            source = pa.OSFile(str(self._path(shard)))
        file = ShardFile(source, size=record.file.bytes, codec=self._dataset.codec, where=record.file.name)
        if len(file) != record.rows:
            raise ShardDamaged(f"{record.file.name}: rows", found=len(file), wanted=record.rows)
        return file

    def _submit(self, shard: int) -> Future[Path]:
        return self._calls.submit(lambda: self._path(shard))

    def _path(self, shard: int) -> Path:
        file = self._dataset.shards[shard].file
        if not self._store.is_local:
            return self._cache.path(self._store, file)
        if shard not in self._verified:
            self._dataset.check_file(file)
            self._verified.add(shard)
        return self._store.local_path(file.name)
