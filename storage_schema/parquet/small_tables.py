"""The small Parquet files of a dataset (plan, faithfulness sample): columns in, bytes out, and back.

They are written without compression, so that a file takes no more memory than it has bytes.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.common.errors import ColdstillError

from .footer import CODECS, PLAIN, RLE, TAIL_BYTES, footer_length, read_footer
from .pages import check_pages

MAX_TABLE_BYTES = 256 << 20
_MAX_FOOTER_BYTES = 1 << 20
_MAX_NESTED = 1 << 24
"""The most values of a column of lists."""


def table_to_bytes(table: pa.Table) -> bytes:
    """A Parquet file: plain encoding, page checksums."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True, store_schema=False)
    return sink.getvalue()


def table_from_bytes(
    data: bytes, *, schema: pa.Schema, max_rows: int, where: str, error: type[ColdstillError]
) -> pa.Table:
    """The table in `data`. Raises `error` where it is larger, of other columns, or not stored as we write it."""
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
    """Rows of a file whose footer names what we write and no more. Raises `ValueError`."""
    if len(data) < 12:
        raise ValueError(f"{len(data)} bytes")
    length = footer_length(data[-TAIL_BYTES:], size=len(data), most=_MAX_FOOTER_BYTES)
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
