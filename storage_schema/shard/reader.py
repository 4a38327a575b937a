"""A shard's rows: all of them from its bytes, or one by number from a seekable file."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.codec import RowCodec
from coldstill.storage_schema.errors import ShardDamaged
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.parquet.footer import GroupFacts
from coldstill.storage_schema.parquet.pages import check_pages
from coldstill.storage_schema.recent import Recent
from coldstill.storage_schema.rows import CachedRow

from .batch_rows import BatchRows
from .footer import footer_header, open_parquet

_CACHED_GROUPS = 2


class ShardFile:
    """An open shard. Its footer is checked at once, a row group when it is read, a row when it is decoded.

    Raises `ShardDamaged` and, where `codec` is that of another dataset, `HeaderMismatch`.
    """

    def __init__(self, source: pa.NativeFile, *, size: int, codec: RowCodec | None, where: str):
        self._source, self._where = source, where
        self._file, self._facts = open_parquet(source, size=size, where=where)
        self.header: DatasetHeader = footer_header(self._facts, where=where)
        if codec is not None:
            codec.header.require_equal(
                self.header, where=f"{where}: footer", fix="this shard belongs to another dataset"
            )
        self._codec = codec or RowCodec(self.header)
        self.group_rows = tuple(group.rows for group in self._facts.groups)
        self._batches: Recent[int, BatchRows] = Recent(_CACHED_GROUPS)

    def __len__(self) -> int:
        """Rows."""
        return sum(self.group_rows)

    def batch(self, group: int) -> pa.RecordBatch:
        """A row group as it is stored, frames unopened. Raises `ShardDamaged`."""
        at = f"{self._where}: row group {group}"
        facts = self._facts.groups[group]
        try:
            self._check_pages(facts)
            table = self._file.read_row_group(group, use_threads=False)
            table.validate()
            batches = table.combine_chunks().to_batches()
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise ShardDamaged(at, found=f"{type(error).__name__}: {error}"[:300], wanted="whole pages") from None
        if len(batches) != 1 or batches[0].num_rows != facts.rows:
            raise ShardDamaged(at, found=f"{table.num_rows} rows", wanted=facts.rows)
        return batches[0]

    def _check_pages(self, group: GroupFacts) -> None:
        first, last = group.chunks[0], group.chunks[-1]
        self._source.seek(first.place)
        # One read, and of a remote file one request: what Arrow asks for next is in the file's buffer then.
        data = memoryview(self._source.read_buffer(last.place + last.stored - first.place))
        for chunk in group.chunks:
            start = chunk.place - first.place
            check_pages(data[start : start + chunk.stored], chunk)

    def row(self, index: int) -> CachedRow:
        """Row number `index`: one row group is read, one row is decoded."""
        first = 0
        for group, rows in enumerate(self.group_rows):
            if index < first + rows:
                return self._row(self._batches.get(group, self._batch_rows), index - first, index)
            first += rows
        raise IndexError(f"row {index} of a shard of {first} rows")

    def rows(self) -> Iterator[CachedRow]:
        """All rows, a row group at a time."""
        number = 0
        for group in range(len(self.group_rows)):
            batch = self._batch_rows(group)
            index = 0
            while index < len(batch):
                try:
                    rows = batch.some(index)
                except ColdstillError as error:
                    raise error.at(f"{self._where}, row {number}") from None
                yield from rows
                index += len(rows)
                number += len(rows)

    def _batch_rows(self, group: int) -> BatchRows:
        return BatchRows(self.batch(group), self._codec)

    def _row(self, batch: BatchRows, index: int, number: int) -> CachedRow:
        try:
            return batch.row(index)
        except ColdstillError as error:
            raise error.at(f"{self._where}, row {number}") from None


def read_shard(data: bytes, *, header: DatasetHeader, where: str) -> Iterator[CachedRow]:
    """Rows of a shard given as bytes. Raises `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`."""
    return ShardFile(pa.BufferReader(data), size=len(data), codec=RowCodec(header), where=where).rows()
