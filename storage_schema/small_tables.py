"""The small Parquet files of a dataset (plan, faithfulness sample): columns in, bytes out, and back.

They are written without compression, so that a file takes no more memory than it has bytes.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import ColdstillError

MAX_TABLE_BYTES = 256 << 20
_ENCODINGS = {"PLAIN", "RLE"}


def table_to_bytes(table: pa.Table) -> bytes:
    """A Parquet file: plain encoding, page checksums."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        if table.num_rows:
            writer.write_table(table)
    return sink.getvalue()


def table_from_bytes(
    data: bytes, *, schema: pa.Schema, max_rows: int, where: str, error: type[ColdstillError]
) -> pa.Table:
    """The table in `data`. Raises `error` where it is larger, of other columns, or not stored as we write it."""
    if len(data) > MAX_TABLE_BYTES:
        raise error(where, found=f"{len(data)} bytes", wanted=f"at most {MAX_TABLE_BYTES}")
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data),
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
            thrift_string_size_limit=1 << 20,
            thrift_container_size_limit=1 << 16,
        )
        found = file.schema_arrow.remove_metadata()
        if not found.equals(schema):
            raise error(f"{where}: columns", found=str(found)[:300], wanted=str(schema))
        _check(file.metadata, len(data), max_rows, where, error)
        table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as failure:
        raise error(where, found=f"{type(failure).__name__}: {failure}"[:300], wanted="a whole Parquet file") from None
    if table.num_rows != file.metadata.num_rows:
        raise error(where, found=f"{table.num_rows} rows", wanted=file.metadata.num_rows)
    return table


def _check(metadata: pq.FileMetaData, size: int, max_rows: int, where: str, error: type[ColdstillError]) -> None:
    if not 0 <= metadata.num_rows <= max_rows:
        raise error(f"{where}: rows", found=metadata.num_rows, wanted=f"at most {max_rows}")
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    for chunk in chunks:
        if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or not set(chunk.encodings) <= _ENCODINGS:
            raise error(where, found=f"{chunk.compression}, {chunk.encodings}", wanted="plain pages, no compression")
        if chunk.data_page_offset < 4 or chunk.data_page_offset + chunk.total_compressed_size > size:
            raise error(where, found=f"a column at {chunk.data_page_offset}", wanted=f"inside the {size} bytes")
