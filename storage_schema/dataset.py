"""A sealed dataset: `open_dataset(path)` gives rows by number, by slice and by shard.

Shards are opened on demand.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from cachetools import LRUCache

from .codec import RowCodec
from .errors import CommitDamaged, FileDamaged, FileMissing, ShardDamaged
from .faithfulness import FAITHFULNESS_NAME, ExactPosition, sample_from_bytes
from .header import FORMAT_VERSION, HEADER_NAME, MAX_HEADER_BYTES, DatasetHeader
from .manifest import MANIFEST_NAME, Manifest, ShardRecord, read_manifest
from .parquet import MAX_TABLE_BYTES
from .rows import MAX_MEDIA_BYTES, MEDIA_FOLDER, CachedRow, MediaReference
from .shard import ShardFile
from .store import MAX_FILE_BYTES, Store
from .tokenizer import MAX_TOKENIZER_BYTES, TOKENIZER_FILES, TOKENIZER_FOLDER, without_code
from .verified_files import FileRecord, check_file, read_file, require_size

_OPEN_SHARDS = 8


def open_dataset(path: str | Path) -> Dataset:
    """The sealed dataset at a local path or fsspec URL.

    Raises `DatasetNotFound`, `DatasetNotSealed`, `CommitDamaged`, `InvalidHeader`, `UnsupportedFormat`.
    """
    return Dataset(Store(path))


class Dataset:
    """Rows of a sealed dataset by number, by slice and by shard.

    `row` reads the footer of a shard and one row group, and checks page and frame checksums. `read_shard` and `rows`
    read whole shards and verify each against the digest in the manifest.
    """

    def __init__(self, store: Store):
        self.store = store
        self.manifest: Manifest
        self.manifest, self.dataset_id = read_manifest(store)
        self.header = DatasetHeader.from_bytes(self._header_bytes(), where=f"{store.url}/{HEADER_NAME}")
        if self.header.format_version != self.manifest.format_version:
            raise CommitDamaged(
                f"{store.url}/{MANIFEST_NAME}: format_version",
                found=self.manifest.format_version,
                wanted=f"{self.header.format_version}, as in {HEADER_NAME}",
            )
        self.codec = RowCodec(self.header)
        self._first_rows = [0, *itertools.accumulate(shard.rows for shard in self.manifest.shards)]
        # Not `cachedmethod`: its reference to `self` would keep open shards until Python collects cycles.
        self._open_shards: LRUCache[int, ShardFile] = LRUCache(_OPEN_SHARDS)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """The shards by unit number."""
        return self.manifest.shards

    def __len__(self) -> int:
        """Number of rows."""
        return self.manifest.rows

    def first_row(self, shard: int) -> int:
        """Number of the first row of shard number `shard`."""
        return self._first_rows[shard]

    def row(self, index: int) -> CachedRow:
        """Row number `index`. Raises `IndexError`, and what `read_shard` raises."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        shard = bisect.bisect_right(self._first_rows, index) - 1
        file = self._open_shards.get(shard)
        if file is None:
            file = self._open_shards[shard] = self._open_shard(shard)
        return file.row(index - self._first_rows[shard])

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[CachedRow]:
        """Rows `start..stop` in order, with one row group decoded at a time."""
        stop = len(self) if stop is None else min(stop, len(self))
        for shard, first in enumerate(self._first_rows[:-1]):
            if first < stop and self._first_rows[shard + 1] > start:
                rows = self.shard_file(shard).rows()
                yield from itertools.islice(rows, max(0, start - first), stop - first)

    def read_shard(self, index: int) -> list[CachedRow]:
        """All rows of shard number `index`, after its digest is verified.

        Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`.
        """
        return list(self.shard_file(index).rows())

    def shard_file(self, index: int) -> ShardFile:
        """Shard number `index`, read whole and verified against its digest. Raises what `read_shard` raises."""
        record = self.shards[index]
        return self.open_bytes(self.read_file(record.file), record)

    def open_bytes(self, data: bytes, record: ShardRecord) -> ShardFile:
        """The shard of `record` from its bytes. Raises `ShardDamaged`, `HeaderMismatch`."""
        return self._counted(
            record, ShardFile(pa.BufferReader(data), size=len(data), codec=self.codec, where=record.file.name)
        )

    def _open_shard(self, index: int) -> ShardFile:
        """Shard number `index`, of which only the footer is read yet."""
        record = self.shards[index]
        size = require_size(self.store, record.file)
        source = pa.PythonFile(self.store.open(record.file.name), mode="r")
        return self._counted(record, ShardFile(source, size=size, codec=self.codec, where=record.file.name))

    def _counted(self, record: ShardRecord, file: ShardFile) -> ShardFile:
        if len(file) != record.rows:
            raise ShardDamaged(f"{record.file.name}: rows", found=len(file), wanted=record.rows)
        return file

    def check_row(self, row: CachedRow) -> None:
        """Raise `InvalidRow` or `InvalidTargets` unless a row of this dataset passes the checks of `rows.py`.

        Decoded values may differ by the steps of the codec.
        """
        processor = self.header.about.processor
        row.check(
            token_count=self.header.token_count,
            label_slack=self.codec.label_slack(row.targets.log_tail),
            image_token_id=processor.image_token_id if processor else None,
        )

    def read_file(self, file: FileRecord, *, at_most: int = MAX_FILE_BYTES) -> bytes:
        """The content of a file that the manifest names, verified. Raises what `verified_files.read_file` raises."""
        return read_file(self.store, file, at_most=at_most)

    def media_content(self, item: MediaReference) -> bytes:
        """The content of a medium of a row, from the row or its file; at most `MAX_MEDIA_BYTES`, digest verified.

        Raises `FileMissing` for a file that is gone or that the manifest does not name, `FileDamaged`, and what
        `verified_files.read_file` raises.
        """
        where = f"{self.store.url}: media {item.path or item.sha256[:64]}"
        if item.data is not None:
            if (found := hashlib.sha256(item.data).hexdigest()) != item.sha256:
                raise FileDamaged(where, found=f"sha256 {found}", wanted=item.sha256[:64])
            return item.data
        file = self._media_files.get(item.path or "")
        if file is None:
            raise FileMissing(where, found="no such file in the manifest", wanted="a file that the manifest lists")
        if file.sha256 != item.sha256:
            raise FileDamaged(where, found=f"sha256 {file.sha256}", wanted=item.sha256[:64])
        return self.read_file(file, at_most=MAX_MEDIA_BYTES)

    def media_bytes(self, item: MediaReference) -> int | None:
        """The size of a medium's content, without opening its file; None for one that the manifest does not name."""
        if item.data is not None:
            return len(item.data)
        file = self._media_files.get(item.path or "")
        return file.bytes if file else None

    @cached_property
    def _media_files(self) -> dict[str, FileRecord]:
        return {file.name: file for file in self.manifest.files if file.name.startswith(f"{MEDIA_FOLDER}/")}

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the dataset's tokenizer by name, such as `tokenizer.json`: only names of `TOKENIZER_FILES`, and
        nothing in them names code to load. Empty if the dataset holds no tokenizer.

        Raises `TokenizerNotFound`, and what `read_file` raises.
        """
        names = {f"{TOKENIZER_FOLDER}/{name}": name for name in TOKENIZER_FILES}
        listed = [file for file in self.manifest.files if file.name in names]
        files = {names[file.name]: self.read_file(file, at_most=MAX_TOKENIZER_BYTES) for file in listed}
        return without_code(files, where=f"{self.store.url}/{TOKENIZER_FOLDER}")

    def faithfulness_bytes(self) -> bytes | None:
        """The file of the faithfulness sample, None if there is none. Format 2 has no digest of it, but checksums.

        Raises what `read_file` raises.
        """
        if self.manifest.format_version == 1:
            record = next((file for file in self.manifest.files if file.name == FAITHFULNESS_NAME), None)
            return self.read_file(record) if record else None
        try:
            return self.store.read(FAITHFULNESS_NAME, at_most=MAX_TABLE_BYTES)
        except FileNotFoundError:
            return None

    def faithfulness_sample(self) -> list[ExactPosition]:
        """The faithfulness sample, empty if there is none. Raises what `read_file` raises."""
        data = self.faithfulness_bytes()
        return sample_from_bytes(data, where=f"{self.store.url}/{FAITHFULNESS_NAME}") if data else []

    def check_file(self, file: FileRecord) -> None:
        """Verifies a file of any size, one block in memory at a time. Raises what `check_file` raises."""
        check_file(self.store, file)

    def _header_bytes(self) -> bytes:
        for file in self.manifest.files:
            if file.name == HEADER_NAME:
                try:
                    return self.read_file(file, at_most=MAX_HEADER_BYTES)
                except FileDamaged as damage:
                    if self.manifest.format_version < FORMAT_VERSION:
                        fix = f"re-run `coldstill upgrade` if it was interrupted; otherwise {damage.fix}"
                        damage = FileDamaged(damage.what, found=damage.found, wanted=damage.wanted, fix=fix)
                    raise damage from None
        raise CommitDamaged(f"{self.store.url}/{MANIFEST_NAME}: files", found=f"no {HEADER_NAME}", wanted="the header")
