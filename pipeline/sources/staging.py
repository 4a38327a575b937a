"""`staging/` in the dataset directory: a seekable copy of a source without random access.

The copy is Parquet with the JSON text of each row. Each part appears whole. The index (`SourceIndex` in `source.py`)
makes the parts visible and is written last, so that a staging that was killed starts from the beginning. Sealing the
dataset removes the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.store import Store

from .files import SourceFile, SourceRow, Stream, parse_row
from .parquet_rows import ParquetRows

STAGING_FOLDER = "staging"
_PART_BYTES, _PART_ROWS = 256 << 20, 1 << 17
_GROUP_BYTES, _GROUP_ROWS = 4 << 20, 1024
"""Size of a row group. A unit reads its row groups whole, so they bound what it reads beyond its own rows."""
_SCHEMA = pa.schema([pa.field("row", pa.large_binary(), nullable=False)])


def stage(store: Store, stream: Stream) -> tuple[SourceFile, ...]:
    """Copy all rows of a stream to the store and return the parts in order.

    Raises `SourceUnreadable`, `StorageFull`.
    """
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


def remove_staging(store: Store) -> None:
    """Remove the copy and the index. A sealed dataset needs neither."""
    store.delete_folder(STAGING_FOLDER)


class StagedRows(ParquetRows):
    """The rows of the copy."""

    def __init__(self, store: Store, parts: Sequence[SourceFile]):
        super().__init__([part.model_copy(update={"name": f"{store.url}/{part.name}"}) for part in parts])

    def rows(self, only: str | None = None) -> Iterator[SourceRow]:
        return map(_parsed, super().rows())

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        return map(_parsed, super().read(unit))


class _Part:
    """A Parquet file that is being written."""

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


def _parsed(row: SourceRow) -> SourceRow:
    assert row.columns is not None
    return parse_row(row.number, row.columns["row"])
