"""What a capture knows of its source, beside the dataset: the index of its files, and its rows where they cannot be
sought in the source itself.

A source that can only be read from its start is copied once to `staging/`, as Parquet with a JSON text for each row.
Each part is put in place whole, and the index, which alone makes them visible, comes last: a staging that was killed
starts again. Sealing removes the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from coldstill.common.models import FrozenModel, parse_document
from coldstill.pipeline.errors import SourceUnreadable
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.store import Store

from .parquet_rows import ParquetRows
from .rows import SourceFile, SourceRow, parsed
from .streams import Stream

STAGING_FOLDER = "staging"
_INDEX_NAME = f"{STAGING_FOLDER}/source.json"
_PART_BYTES, _PART_ROWS = 256 << 20, 1 << 17
_GROUP_BYTES, _GROUP_ROWS = 4 << 20, 1024
_SCHEMA = pa.schema([pa.field("row", pa.large_binary(), nullable=False)])


class SourceIndex(FrozenModel):
    """The source when its plan was made."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Digest of the whole content.")
    sample_sha256: str = Field(description="Digest of some blocks: see `sample_sha256` in files.py.")
    rows: int
    files: tuple[SourceFile, ...]
    parts: tuple[SourceFile, ...] = Field(default=(), description="The staged copy, where there is one.")
    settings: dict[str, Any] = Field(description="Those that say what is read, and are in no digest.")


def write_index(store: Store, index: SourceIndex) -> None:
    """From here on the source is staged."""
    store.put(_INDEX_NAME, index.model_dump_json(indent=1).encode())


def read_index(store: Store) -> SourceIndex | None:
    """The index, where there is one. Raises `SourceUnreadable`."""
    with suppress(FileNotFoundError):
        return parse_document(store.read(_INDEX_NAME), model=SourceIndex, where=_INDEX_NAME, error=SourceUnreadable)
    return None


def remove_staging(store: Store) -> None:
    """Remove the index and the staged rows: for a dataset that is sealed."""
    store.delete_folder(STAGING_FOLDER)


def stage(store: Store, stream: Stream) -> tuple[SourceFile, ...]:
    """Copy all rows of a stream to the store; the parts, in order. Raises `SourceUnreadable`, `StorageFull`."""
    remove_staging(store)
    parts: list[SourceFile] = []
    documents = stream.documents()
    document = next(documents, None)
    while document is not None:
        name = f"{STAGING_FOLDER}/{len(parts):06d}.parquet"
        with _part(store, name) as part:
            while document is not None and not part.is_full:
                part.add(document)
                document = next(documents, None)
        parts.append(SourceFile(name=name, bytes=store.size(name), stamp="", rows=part.rows))
    return tuple(parts)


class StagedRows(ParquetRows):
    """Rows of staged parts."""

    def __init__(self, store: Store, index: SourceIndex):
        super().__init__([part.model_copy(update={"name": f"{store.url}/{part.name}"}) for part in index.parts])

    def rows(self) -> Iterator[SourceRow]:
        return map(_unpacked, super().rows())

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        return map(_unpacked, super().read(unit))


class _Part:
    """One Parquet file under way. A row group has at most 1,024 rows and about 4 MiB: what a unit reads too much."""

    def __init__(self, writer: pq.ParquetWriter):
        self._writer = writer
        self._documents: list[bytes] = []
        self._waiting = self._bytes = self.rows = 0

    @property
    def is_full(self) -> bool:
        return self._bytes >= _PART_BYTES or self.rows >= _PART_ROWS

    def add(self, document: bytes) -> None:
        self._documents.append(document)
        self._waiting += len(document)
        self._bytes += len(document)
        self.rows += 1
        if self._waiting >= _GROUP_BYTES or len(self._documents) >= _GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._documents:
            self._writer.write_table(pa.table([self._documents], schema=_SCHEMA))
        self._documents, self._waiting = [], 0


@contextmanager
def _part(store: Store, name: str) -> Iterator[_Part]:
    with (
        store.receive(name) as path,
        pq.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=False) as writer,
    ):
        part = _Part(writer)
        yield part
        part.flush()


def _unpacked(row: SourceRow) -> SourceRow:
    assert row.columns is not None
    return parsed(row.number, row.columns["row"])
