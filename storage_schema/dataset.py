"""The one way in: `open_dataset(path)`. Path of a sealed dataset in, rows out; shards are opened when needed."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .commits import SHARDS_FOLDER, FileRecord
from .errors import CommitDamaged, FileDamaged, FileMissing, ShardDamaged, ShardMissing
from .header import HEADER_NAME, DatasetHeader
from .manifest import MANIFEST_NAME, Manifest, ShardRecord, read_manifest
from .rows import CachedRow
from .shard import read_shard
from .store import Store


def open_dataset(path: str | Path) -> Dataset:
    """The sealed dataset at a local path or fsspec URL. Raises `DatasetNotFound`, `DatasetNotSealed`, `CommitDamaged`,
    `InvalidHeader`, `UnsupportedFormat`."""
    return Dataset(Store(path))


class Dataset:
    """Rows of a sealed dataset by number, by slice and by shard."""

    def __init__(self, store: Store):
        self.store = store
        self.manifest: Manifest
        self.manifest, self.dataset_id = read_manifest(store)
        self.header = DatasetHeader.from_bytes(self._header_bytes(), where=f"{store.url}/{HEADER_NAME}")
        self._first_rows = [0, *itertools.accumulate(shard.rows for shard in self.manifest.shards)]
        self._cached_shard = lru_cache(maxsize=2)(self.read_shard)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """The shards in the order of their units."""
        return self.manifest.shards

    def __len__(self) -> int:
        """Rows."""
        return self.manifest.rows

    def row(self, index: int) -> CachedRow:
        """Row number `index`; raises `IndexError`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        shard = bisect.bisect_right(self._first_rows, index) - 1
        return self._cached_shard(shard)[index - self._first_rows[shard]]

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[CachedRow]:
        """Rows `start..stop` in order, shard by shard."""
        return (self.row(index) for index in range(start, len(self) if stop is None else min(stop, len(self))))

    def read_shard(self, index: int) -> list[CachedRow]:
        """All rows of shard number `index`; its digest is verified first.

        Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`.
        """
        record = self.shards[index]
        rows = list(read_shard(self.read_file(record.file), header=self.header, where=record.file.name))
        if len(rows) != record.rows:
            raise ShardDamaged(f"{record.file.name}: rows", found=len(rows), wanted=record.rows)
        return rows

    def read_file(self, file: FileRecord) -> bytes:
        """A file that the manifest names, verified. Raises `FileMissing` or `FileDamaged`; for a shard `ShardMissing`
        or `ShardDamaged`."""
        is_shard = file.name.startswith(f"{SHARDS_FOLDER}/")
        missing, damaged = (ShardMissing, ShardDamaged) if is_shard else (FileMissing, FileDamaged)
        where = f"{self.store.url}/{file.name}"
        try:
            data = self.store.read(file.name)
        except FileNotFoundError:
            raise missing(
                where,
                found="no such file",
                wanted="a file that the manifest names",
                fix="copy the dataset again: this copy is not whole",
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != file.bytes or digest != file.sha256:
            raise damaged(
                where,
                found=f"{len(data)} bytes, sha256 {digest}",
                wanted=f"{file.bytes} bytes, sha256 {file.sha256}",
                fix="copy this file again from where the dataset came from",
            )
        return data

    def _header_bytes(self) -> bytes:
        for file in self.manifest.files:
            if file.name == HEADER_NAME:
                return self.read_file(file)
        raise CommitDamaged(f"{self.store.url}/{MANIFEST_NAME}: files", found=f"no {HEADER_NAME}", wanted="the header")
