"""Small Parquet tables, and checks of any Parquet file before Arrow opens it.

Arrow trusts every file. It ends the process on an unknown codec, and allocates memory by the number of values in a
footer and by the size in a page header. So footers and page headers are read and checked by our own code first
(`thrift.py`). Field numbers are those of the Parquet format's `FileMetaData` and `PageHeader`.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.common.errors import ColdstillError

from .thrift import Fields, read_struct

CODECS = {0: "UNCOMPRESSED", 6: "ZSTD"}
PLAIN, RLE = 0, 3

_ENCRYPTION = {8, 9}
_FILE_PATH_AND_ENCRYPTION = {1, 8, 9}
_INDEX_AND_DICTIONARY = {10, 11}

_TAIL = struct.Struct("<I4s")
TAIL_BYTES = _TAIL.size
"""The length of the footer and four letters, at the end of every file."""

_DATA_PAGE = 0
_MAX_PAGE_HEADER = 64 << 10
"""Four times the longest header that we write: it holds the least and the greatest sample id, of 4 kB each, twice."""
_MAX_PAGES = 1024
"""Four times the number of pages that we write for the largest row: checking a header takes as long as opening a
page."""

MAX_FOREIGN_FOOTER = 16 << 20
"""That of 4,000 row groups of 30 columns. Our reader takes 5 seconds for it."""

MAX_TABLE_BYTES = 256 << 20
_MAX_TABLE_FOOTER = 1 << 20
_MAX_NESTED = 1 << 24
"""Maximum number of values in a list column of a small table."""


class ChunkFacts(NamedTuple):
    """The column chunk of a row group, as the footer describes it.

    `path`: column name in the schema, joined by dots. `codec`, `encodings`: of its pages. `values`: list elements, with
    nulls and empty lists. `raw`: bytes uncompressed. `stored`: bytes in the file, from offset `place` on.
    `other_pages`: whether it has dictionary or index pages.
    """

    path: str
    codec: int
    encodings: frozenset[int]
    values: int
    raw: int
    stored: int
    place: int
    other_pages: bool


class GroupFacts(NamedTuple):
    """A row group, as the footer describes it."""

    rows: int
    chunks: list[ChunkFacts]


class FooterFacts(NamedTuple):
    """A file, as its footer describes it. `key_values`: its key-value metadata."""

    rows: int
    groups: list[GroupFacts]
    key_values: dict[bytes, bytes]


def footer_length(tail: bytes, *, size: int, most: int) -> int:
    """Bytes of the footer of a file of `size` bytes, from its last `TAIL_BYTES`. Raises `ValueError`."""
    length, magic = _TAIL.unpack(tail)
    if magic != b"PAR1" or length > min(most, size - 12):
        raise ValueError(f"a footer of {length} bytes, {magic!r}")
    return int(length)


def read_footer(footer: bytes) -> FooterFacts:
    """The facts of a footer without its length and magic; its numbers are not checked.

    Raises `ValueError` for a footer that does not parse, is encrypted or points to other files.
    """
    try:
        fields, end = read_struct(footer)
        if end != len(footer):
            raise ValueError(f"{len(footer) - end} bytes after it")
        if _ENCRYPTION & fields.keys():
            raise ValueError("encryption")
        pairs = [(_bytes(pair, 1), _bytes(pair, 2)) for pair in fields.get(5, [])]
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a duplicate key")
        groups = [GroupFacts(_integer(group, 3), [_chunk(chunk) for chunk in group[1]]) for group in fields[4]]
        return FooterFacts(_integer(fields, 3), groups, dict(pairs))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def check_foreign_footer(file: BinaryIO) -> None:
    """Checks the footer of another tool's file, with pages of any kind. Raises `ValueError`.

    Arrow would allocate lists by the counts in it, up to a gigabyte for a file of a kilobyte.
    """
    size = file.seek(0, io.SEEK_END)
    if size < 12:
        raise ValueError(f"{size} bytes")
    file.seek(size - TAIL_BYTES)
    length = footer_length(file.read(TAIL_BYTES), size=size, most=MAX_FOREIGN_FOOTER)
    file.seek(size - TAIL_BYTES - length)
    facts = read_footer(file.read(length))
    if min([0, *(group.rows for group in facts.groups)]) < 0 or sum(group.rows for group in facts.groups) != facts.rows:
        raise ValueError(f"{facts.rows} rows, but other numbers in its row groups")
    for group in facts.groups:
        for chunk in group.chunks:
            if chunk.values < group.rows or min(chunk.raw, chunk.stored, chunk.place) < 0 or chunk.stored > size:
                found = f"{chunk.values} values of {group.rows} rows, {chunk.stored} bytes at {chunk.place}"
                raise ValueError(f"column {chunk.path}: {found}")


def _chunk(chunk: Fields) -> ChunkFacts:
    if _FILE_PATH_AND_ENCRYPTION & chunk.keys():
        raise ValueError("a column in another file, or an encrypted one")
    fields = chunk[3]
    return ChunkFacts(
        path=b".".join(fields[3]).decode(),
        codec=_integer(fields, 4),
        encodings=frozenset(fields[2]),
        values=_integer(fields, 5),
        raw=_integer(fields, 6),
        stored=_integer(fields, 7),
        place=_integer(fields, 9),
        other_pages=bool(_INDEX_AND_DICTIONARY & fields.keys()),
    )


def _integer(fields: Fields, number: int) -> int:
    value = fields[number]
    if type(value) is not int:
        raise ValueError(f"field {number} is not a number")
    return value


def _bytes(fields: Fields, number: int) -> bytes:
    value = fields[number]
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is not text")
    return value


class PageFacts(NamedTuple):
    """A page: its values, and the offsets in its column chunk where their bytes begin and end."""

    values: int
    start: int
    stop: int


def check_pages(data: memoryview, chunk: ChunkFacts) -> list[PageFacts]:
    """The pages of `data`, the stored bytes of `chunk`.

    Raises `ValueError` unless all are plain data pages whose bytes and values add up to those in the footer.
    """
    place = raw = values = 0
    pages: list[PageFacts] = []
    while place < len(data) and len(pages) < _MAX_PAGES:
        header, stored, page_raw, page_values = _page(bytes(data[place : place + _MAX_PAGE_HEADER]))
        pages.append(PageFacts(page_values, place + header, place + header + stored))
        place += header + stored
        raw += header + page_raw
        values += page_values
    if place != len(data) or (place, raw, values) != (chunk.stored, chunk.raw, chunk.values):
        raise ValueError(
            f"column {chunk.path}: {len(pages)} pages of {place} bytes, {raw} uncompressed, {values} values; "
            f"the footer has {chunk.stored}, {chunk.raw} and {chunk.values}"
        )
    return pages


def _page(data: bytes) -> tuple[int, int, int, int]:
    """Bytes of a page's header, bytes of the page stored and uncompressed, and its number of values."""
    try:
        header, length = read_struct(data)
        facts = [header[number] for number in (1, 2, 3)]
        facts += [header[5][number] for number in (1, 2, 3, 4)]
    except (LookupError, TypeError) as error:
        raise ValueError(f"a page header without {error}") from None
    if not all(type(fact) is int for fact in facts):
        raise ValueError("a page header without numbers")
    kind, raw, stored, values, *encodings = facts
    if kind != _DATA_PAGE or encodings != [PLAIN, RLE, RLE] or min(raw, stored, values) < 0:
        raise ValueError(f"a page of type {kind} and encodings {encodings}, of {stored} bytes and {values} values")
    return length, stored, raw, values


def required(name: str, kind: pa.DataType) -> pa.Field:
    """A column without nulls. Every column of a dataset is one."""
    return pa.field(name, kind, nullable=False)


def list_of(kind: pa.DataType) -> pa.DataType:
    """A list type with the element name of the Parquet format."""
    return pa.list_(required("element", kind))


def values_of(array: pa.Array, kind: type) -> np.ndarray:
    """`kind [n]`, read only: the memory of an array of numbers without nulls, not copied.

    Arrow's own conversion imports pandas first, which takes seconds.
    """
    if not len(array):
        return np.empty(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), np.dtype(kind).itemsize * array.offset)


def table_to_bytes(table: pa.Table) -> bytes:
    """A small table as a Parquet file: plain encoding, page checksums, and no compression, so that reading it takes no
    more memory than the file has bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True, store_schema=False)
    return sink.getvalue()


def table_from_bytes(
    data: bytes, *, schema: pa.Schema, max_rows: int, where: str, error: type[ColdstillError]
) -> pa.Table:
    """The table in `data`. Raises `error` for one that is too large, has other columns, or is stored in another way
    than `table_to_bytes` does."""
    if len(data) > MAX_TABLE_BYTES:
        raise error(where, found=f"{len(data)} bytes", wanted=f"at most {MAX_TABLE_BYTES}")
    try:
        rows = _checked_rows(data, max_rows)
        file = pq.ParquetFile(
            pa.BufferReader(data),
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
            thrift_string_size_limit=1 << 20,
            thrift_container_size_limit=1 << 16,
        )
        found = file.schema_arrow.remove_metadata()
        if not found.equals(schema):
            raise ValueError(f"columns {str(found)[:200]}")
        table = file.read()
        table.validate(full=True)
        if table.num_rows != rows:
            raise ValueError(f"{table.num_rows} rows of {rows}")
    except (pa.ArrowException, OSError, ValueError, MemoryError) as failure:
        raise error(
            where, found=f"{type(failure).__name__}: {failure}"[:300], wanted="a whole Parquet file of our own columns"
        ) from None
    return table


def _checked_rows(data: bytes, max_rows: int) -> int:
    """Rows of a file, after its footer and page headers are checked. Raises `ValueError`."""
    if len(data) < 12:
        raise ValueError(f"{len(data)} bytes")
    length = footer_length(data[-TAIL_BYTES:], size=len(data), most=_MAX_TABLE_FOOTER)
    start = len(data) - TAIL_BYTES - length
    facts = read_footer(data[start : start + length])
    rows, end = 0, 4
    for group in facts.groups:
        if not 0 <= group.rows <= max_rows - rows:
            raise ValueError(f"more than {max_rows} rows")
        rows += group.rows
        for chunk in group.chunks:
            if CODECS.get(chunk.codec) != "UNCOMPRESSED" or chunk.other_pages or not chunk.encodings <= {PLAIN, RLE}:
                raise ValueError("other than plain pages without compression")
            if not end <= chunk.place <= chunk.place + chunk.stored <= start or chunk.raw != chunk.stored:
                raise ValueError(f"a column at {chunk.place}")
            end = chunk.place + chunk.stored
            check_pages(memoryview(data)[chunk.place : end], chunk)
            nested = chunk.stored // 4 if "." in chunk.path else 0
            if not 0 <= chunk.values - group.rows <= min(nested, _MAX_NESTED):
                raise ValueError(f"{chunk.values} values of {group.rows} rows")
    if rows != facts.rows:
        raise ValueError(f"{rows} rows of {facts.rows}")
    return rows
