"""How large the pages of a row group say they are, before any is opened.

Arrow takes the memory that a page's own header asks for; the footer's total, which `footer.py` bounds, may say another.
A page header is a Thrift struct in the compact protocol (the Parquet format's `PageHeader`): field 1 the page's type,
2 its uncompressed and 3 its compressed size. The other fields are stepped over.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from storage_schema.errors import ShardDamaged

_DATA_PAGE = 0
_MAX_HEADER = 64 << 10
_MAX_DEPTH = 8
_BOOLEANS = (1, 2)
_BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 3, 6, 7, 8, 9, 10, 12


def check_pages(source: pa.NativeFile, group: pq.RowGroupMetaData, *, where: str) -> None:
    """Raise `ShardDamaged` unless the pages of each compressed column chunk fill it exactly, are data pages, and
    together are not larger than the footer says."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.compression == "UNCOMPRESSED":  # takes no more memory than it has bytes
            continue
        at = f"{where}, column {index}"
        source.seek(chunk.data_page_offset)
        data = source.read(chunk.total_compressed_size)
        place = raw = 0
        while place < len(data):
            try:
                kind, page_raw, page_bytes, length = _page_header(data[place : place + _MAX_HEADER])
            except (IndexError, ValueError) as error:
                raise ShardDamaged(at, found=f"{error} in a page header", wanted="whole page headers") from None
            if kind != _DATA_PAGE or page_raw < 0 or page_bytes < 0:
                raise ShardDamaged(at, found=f"page type {kind}, {page_raw} of {page_bytes} bytes", wanted="data pages")
            place += length + page_bytes
            raw += length + page_raw
        if place != len(data) or len(data) != chunk.total_compressed_size or raw > chunk.total_uncompressed_size:
            raise ShardDamaged(
                at,
                found=f"pages of {place} bytes, {raw} uncompressed",
                wanted=f"{chunk.total_compressed_size} bytes, {chunk.total_uncompressed_size} uncompressed",
            )


def _page_header(data: bytes) -> tuple[int, int, int, int]:
    """Type, uncompressed size and compressed size of a page, and the length of its header."""
    reader = _Compact(data)
    fields = reader.struct(0)
    return fields.get(1, -1), fields.get(2, -1), fields.get(3, -1), reader.place


class _Compact:
    """As much of Thrift's compact protocol as it takes to step over a struct. Raises IndexError at the end of `data`,
    ValueError for what is not of the protocol."""

    def __init__(self, data: bytes):
        self._data, self.place = data, 0

    def struct(self, depth: int) -> dict[int, int]:
        """Integer fields by number."""
        fields: dict[int, int] = {}
        number = 0
        while kind := self._byte():
            step, kind = kind >> 4, kind & 15
            number = number + step if step else self._integer()
            value = None if kind in _BOOLEANS else self._value(kind, depth)
            if value is not None:
                fields[number] = value
        return fields

    def _value(self, kind: int, depth: int) -> int | None:
        if depth > _MAX_DEPTH:
            raise ValueError("values too deep")
        if kind in _BOOLEANS or kind == _BYTE:  # a boolean has a byte of its own only inside a list
            return self._byte()
        if kind <= _I64:
            return self._integer()
        if kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._varint())
        elif kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(min(count, len(self._data))):
                self._value(head & 15, depth + 1)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise ValueError(f"type {kind}")
        return None

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self._data):
            raise IndexError("the end of the page")

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
