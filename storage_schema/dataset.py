"""The one way in: `open_dataset(path)`. Path of a sealed dataset in, rows out; shards are opened when needed."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from .codec import RowCodec
from .commits import SHARDS_FOLDER, FileRecord
from .errors import CommitDamaged, FileDamaged, FileMissing, ShardDamaged, ShardMissing
from .header import HEADER_NAME, MAX_HEADER_BYTES, DatasetHeader
from .manifest import MANIFEST_NAME, Manifest, ShardRecord, read_manifest
from .recent import Recent
from .rows import CachedRow
from .shard import ShardFile
from .store import Store

MAX_FILE_BYTES = 512 << 20
"""The most that is read at once: the largest shard, and more than any other file that is not only copied."""

_OPEN_SHARDS = 8
_BLOCK_BYTES = 8 << 20
_COPY_AGAIN = "copy this file again from where the dataset came from"


def open_dataset(path: str | Path) -> Dataset:
    """The sealed dataset at a local path or fsspec URL. Raises `DatasetNotFound`, `DatasetNotSealed`, `CommitDamaged`,
    `InvalidHeader`, `UnsupportedFormat`."""
    return Dataset(Store(path))


class Dataset:
    """Rows of a sealed dataset by number, by slice and by shard.

    A single row costs the footer of its shard and one row group, whose page and frame checksums are checked. What reads
    whole shards (`read_shard`, `rows`) has each verified against the digest in the manifest.
    """

    def __init__(self, store: Store):
        self.store = store
        self.manifest: Manifest
        self.manifest, self.dataset_id = read_manifest(store)
        self.header = DatasetHeader.from_bytes(self._header_bytes(), where=f"{store.url}/{HEADER_NAME}")
        self.codec = RowCodec(self.header)
        self._first_rows = [0, *itertools.accumulate(shard.rows for shard in self.manifest.shards)]
        self._open_shards: Recent[int, ShardFile] = Recent(_OPEN_SHARDS)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """The shards in the order of their units."""
        return self.manifest.shards

    def __len__(self) -> int:
        """Rows."""
        return self.manifest.rows

    def first_row(self, shard: int) -> int:
        """Number of the first row of shard number `shard`."""
        return self._first_rows[shard]

    def row(self, index: int) -> CachedRow:
        """Row number `index`; raises `IndexError`, and what `read_shard` raises."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        shard = bisect.bisect_right(self._first_rows, index) - 1
        return self._open_shards.get(shard, self._open_shard).row(index - self._first_rows[shard])

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[CachedRow]:
        """Rows `start..stop` in order, a row group in memory at a time."""
        stop = len(self) if stop is None else min(stop, len(self))
        for shard, first in enumerate(self._first_rows[:-1]):
            if first < stop and self._first_rows[shard + 1] > start:
                rows = self.shard_file(shard).rows()
                yield from itertools.islice(rows, max(0, start - first), stop - first)

    def read_shard(self, index: int) -> list[CachedRow]:
        """All rows of shard number `index`; its digest is verified first.

        Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`.
        """
        return list(self.shard_file(index).rows())

    def shard_file(self, index: int) -> ShardFile:
        """Shard number `index`, read whole and verified against its digest; raises as `read_shard`."""
        record = self.shards[index]
        return self.open_bytes(self.read_file(record.file), record)

    def open_bytes(self, data: bytes, record: ShardRecord) -> ShardFile:
        """A shard whose file is read already. Raises `ShardDamaged`, `HeaderMismatch`."""
        return self._counted(
            record, ShardFile(pa.BufferReader(data), size=len(data), codec=self.codec, where=record.file.name)
        )

    def _open_shard(self, index: int) -> ShardFile:
        """The same, with nothing read but its footer."""
        record = self.shards[index]
        size = self._size(record.file)
        source = pa.PythonFile(self.store.open(record.file.name), mode="r")
        return self._counted(record, ShardFile(source, size=size, codec=self.codec, where=record.file.name))

    def _counted(self, record: ShardRecord, file: ShardFile) -> ShardFile:
        if len(file) != record.rows:
            raise ShardDamaged(f"{record.file.name}: rows", found=len(file), wanted=record.rows)
        return file

    def read_file(self, file: FileRecord, *, at_most: int = MAX_FILE_BYTES) -> bytes:
        """A file that the manifest names, whole and verified. Raises `FileMissing`, or `FileDamaged` also for one of
        more than `at_most` bytes, before it is read; for a shard `ShardMissing` or `ShardDamaged`."""
        size = self._size(file)
        if size > at_most:
            raise FileDamaged(f"{self.store.url}/{file.name}: size", found=f"{size} bytes", wanted=f"at most {at_most}")
        data = self.store.read(file.name)
        self._require_digest(file, len(data), hashlib.sha256(data).hexdigest())
        return data

    def check_file(self, file: FileRecord) -> None:
        """Verify a file of any size, a block in memory at a time. Raises as `read_file`."""
        self._size(file)
        size, digest = 0, hashlib.sha256()
        with self.store.open(file.name) as source:
            while block := source.read(_BLOCK_BYTES):
                size += len(block)
                digest.update(block)
        self._require_digest(file, size, digest.hexdigest())

    def _size(self, file: FileRecord) -> int:
        missing, damaged = _errors_of(file)
        where = f"{self.store.url}/{file.name}"
        try:
            size = self.store.size(file.name)
        except FileNotFoundError:
            raise _not_there(missing, where) from None
        if size != file.bytes:
            raise damaged(where, found=f"{size} bytes", wanted=f"{file.bytes} bytes", fix=_COPY_AGAIN)
        return size

    def _require_digest(self, file: FileRecord, size: int, sha256: str) -> None:
        if (size, sha256) != (file.bytes, file.sha256):
            raise _errors_of(file)[1](
                f"{self.store.url}/{file.name}",
                found=f"{size} bytes, sha256 {sha256}",
                wanted=f"{file.bytes} bytes, sha256 {file.sha256}",
                fix=_COPY_AGAIN,
            )

    def _header_bytes(self) -> bytes:
        for file in self.manifest.files:
            if file.name == HEADER_NAME:
                return self.read_file(file, at_most=MAX_HEADER_BYTES)
        raise CommitDamaged(f"{self.store.url}/{MANIFEST_NAME}: files", found=f"no {HEADER_NAME}", wanted="the header")


def _errors_of(file: FileRecord) -> tuple[type[FileMissing], type[FileDamaged]]:
    is_shard = file.name.startswith(f"{SHARDS_FOLDER}/")
    return (ShardMissing, ShardDamaged) if is_shard else (FileMissing, FileDamaged)


def _not_there(error: type[FileMissing], where: str) -> FileMissing:
    return error(
        where,
        found="no such file",
        wanted="a file that the manifest names",
        fix="copy the dataset again: this copy is not whole",
    )
