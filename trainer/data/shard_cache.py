"""Shards of a dataset as open local files; remote ones are copied into a bounded cache.

Any number of processes share a cache folder. One process copies at a time; the others wait and then find the copy. A
copy gets its name only after its digest was verified, so every named copy is correct. Removing a copy that another
process has open does not disturb that process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from cachetools import LRUCache
from filelock import FileLock

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import ShardDamaged
from coldstill.storage_schema.shard.reader import ShardFile
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import SHARDS_FOLDER, FileRecord, copy_file

from .prefetch import DaemonExecutor

_LOCK = "lock"
_OPEN_FILES = 8


class ShardCache:
    """Copies in `folder`, at most `most_bytes` together. A shard larger than that is cached alone."""

    def __init__(self, folder: Path, *, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes

    def path(self, source: Store, file: FileRecord) -> Path:
        """Path of the local copy of `file` of the dataset at `source`. A missing copy is made first.

        Raises `ShardMissing`, `ShardDamaged`, `StorageFailed`, `StorageFull`.
        """
        # Named by its digest: datasets that share a shard share its copy.
        copies = Store(self.folder / file.sha256)
        copy = self.folder / file.sha256 / file.name
        if self._touch(copy, file):
            return copy
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / _LOCK):
            if not self._touch(copy, file):
                self._make_room(file.bytes)
                copy_file(source, file, copies, on_block=lambda _: None)
        return copy

    def _touch(self, copy: Path, file: FileRecord) -> bool:
        """Mark a copy as the most recently used one; false if there is none, or a crash of the machine cut it short."""
        try:
            os.utime(copy)
            return copy.stat().st_size == file.bytes
        except OSError:
            return False

    def _make_room(self, wanted: int) -> None:
        """Remove partial copies of killed processes, then least recently used copies until `wanted` bytes fit."""
        for part in self.folder.glob(f"*/{RUN_FOLDER}/*"):
            part.unlink(missing_ok=True)
        copies = sorted((path.stat().st_mtime_ns, path) for path in self.folder.glob(f"*/{SHARDS_FOLDER}/*"))
        total = sum(path.stat().st_size for _, path in copies)
        for _, path in copies:
            if total + wanted <= self.most_bytes:
                return
            total -= path.stat().st_size
            path.unlink()
            for folder in (path.parent, path.parent.parent / RUN_FOLDER, path.parent.parent):
                with suppress(OSError):
                    folder.rmdir()


class LocalShards:
    """Open shards of one dataset, for one thread of one process.

    Shards of a local dataset are read in place and verified against the manifest when first opened. Shards of a remote
    dataset are read from `cache`. `verified` holds the numbers of local shards that passed verification; it grows.
    """

    def __init__(self, dataset: Dataset, *, cache: ShardCache, verified: set[int]):
        # Clients of remote stores do not survive a fork: each loader worker needs its own.
        self._store = dataset.store if dataset.store.is_local else Store(dataset.store.url)
        self._dataset, self._cache, self._verified = dataset, cache, verified
        self._executor = DaemonExecutor()
        self._prefetched: dict[int, Future[Path]] = {}
        self._open: LRUCache[int, ShardFile] = LRUCache(_OPEN_FILES)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Copy or verify the `shards` that are opened next, in this order, in the background."""
        self._prefetched = {shard: self._prefetched.get(shard) or self._submit(shard) for shard in shards}

    def open(self, shard: int) -> ShardFile:
        """Shard number `shard`. Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StorageFailed`."""
        if shard not in self._open:
            self._open[shard] = self._read(shard)
        return self._open[shard]

    def close(self) -> None:
        """End the background thread."""
        self._executor.close()

    def _read(self, shard: int) -> ShardFile:
        record = self._dataset.shards[shard]
        future = self._prefetched.get(shard)
        try:
            source = pa.OSFile(str(future.result() if future else self._path(shard)))
        except FileNotFoundError:  # another process removed the copy to make room in a small cache
            source = pa.OSFile(str(self._path(shard)))
        file = ShardFile(source, size=record.file.bytes, codec=self._dataset.codec, where=record.file.name)
        if len(file) != record.rows:
            raise ShardDamaged(f"{record.file.name}: rows", found=len(file), wanted=record.rows)
        return file

    def _submit(self, shard: int) -> Future[Path]:
        return self._executor.submit(lambda: self._path(shard))

    def _path(self, shard: int) -> Path:
        file = self._dataset.shards[shard].file
        if not self._store.is_local:
            return self._cache.path(self._store, file)
        if shard not in self._verified:
            self._dataset.check_file(file)
            self._verified.add(shard)
        return self._store.local_path(file.name)
