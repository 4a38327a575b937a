"""What a shard's footer may say. Checked before any page is touched: bounds first, then structure.

A footer that names a codec, an encoding, a column or a count that the format does not use is refused from the footer
alone: a stranger's file reaches no more of the Parquet reader than our own files do.
"""

from __future__ import annotations

import struct

import pyarrow as pa
import pyarrow.parquet as pq

from storage_schema.errors import ShardDamaged
from storage_schema.header import MAX_HEADER_BYTES, DatasetHeader

from .columns import PLAIN_COLUMNS, SCHEMA

FOOTER_KEY = b"coldstill"
MAX_SHARD_BYTES = 500_000_000
MAX_GROUP_ROWS = 1024
MAX_GROUP_BYTES = 8 << 20
"""A row group is the finest random access that pyarrow has: a random row costs one small read."""
MAX_ROW_BYTES = 256 << 20
"""A row that is larger than a group has a group to itself."""

_MAX_FOOTER_BYTES = 16 << 20
_MAX_GROUPS = 1 << 16
_GROUP_SLACK = 1 << 20
"""Page headers and levels, which the writer's own count leaves out."""
_ENCODINGS = {"PLAIN", "RLE"}
_TAIL = struct.Struct("<I4s")


def open_parquet(source: pa.NativeFile, *, size: int, where: str) -> pq.ParquetFile:
    """The Parquet file in `source` of `size` bytes, its footer checked. Raises `ShardDamaged`."""
    if not 12 <= size <= MAX_SHARD_BYTES + _MAX_FOOTER_BYTES:
        raise ShardDamaged(where, found=f"{size} bytes", wanted=f"12 to {MAX_SHARD_BYTES}")
    source.seek(size - _TAIL.size)
    footer, magic = _TAIL.unpack(source.read(_TAIL.size))
    if magic != b"PAR1" or footer > min(_MAX_FOOTER_BYTES, size - 12):
        raise ShardDamaged(where, found=f"a footer of {footer} bytes, {magic!r}", wanted="a whole Parquet file")
    source.seek(0)
    try:
        file = pq.ParquetFile(
            source,
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
            thrift_string_size_limit=2 * MAX_HEADER_BYTES,
            thrift_container_size_limit=_MAX_GROUPS,
        )
        found = file.schema_arrow.remove_metadata()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardDamaged(
            where, found=f"{type(error).__name__}: {error}"[:300], wanted="a whole Parquet file"
        ) from None
    if not found.equals(SCHEMA):
        raise ShardDamaged(f"{where}: columns", found=_differing(found), wanted="the columns of FORMAT.md")
    _check_groups(file.metadata, size, where)
    return file


def footer_header(file: pq.ParquetFile, *, where: str) -> DatasetHeader:
    """The header in the footer. Raises `ShardDamaged`, `InvalidHeader`, `UnsupportedFormat`."""
    metadata = file.metadata.metadata or {}
    if FOOTER_KEY not in metadata:
        raise ShardDamaged(f"{where}: footer", found="no header", wanted=f"key {FOOTER_KEY.decode()!r}")
    return DatasetHeader.from_bytes(metadata[FOOTER_KEY], where=f"{where}: footer")


def _check_groups(metadata: pq.FileMetaData, size: int, where: str) -> None:
    rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        at = f"{where}: row group {number}"
        if not 1 <= group.num_rows <= MAX_GROUP_ROWS:
            raise ShardDamaged(f"{at}: rows", found=group.num_rows, wanted=f"1 to {MAX_GROUP_ROWS}")
        rows += group.num_rows
        total = 0
        for index in range(group.num_columns):
            total += _check_chunk(group.column(index), size, f"{at}, column {index}")
        bound = _GROUP_SLACK + (MAX_ROW_BYTES if group.num_rows == 1 else MAX_GROUP_BYTES)
        if total > bound:
            raise ShardDamaged(f"{at}: size", found=f"{total} bytes", wanted=f"at most {bound}")
    if rows != metadata.num_rows:
        raise ShardDamaged(f"{where}: rows", found=f"{rows} in row groups", wanted=f"{metadata.num_rows}")


def _check_chunk(chunk: pq.ColumnChunkMetaData, size: int, where: str) -> int:
    """Uncompressed bytes of a column chunk that is as the format has it."""
    plain = chunk.path_in_schema.split(".")[0] in PLAIN_COLUMNS
    wanted = "ZSTD" if plain else "UNCOMPRESSED"
    if chunk.compression != wanted:
        raise ShardDamaged(f"{where}: compression", found=chunk.compression, wanted=wanted)
    if chunk.has_dictionary_page or not set(chunk.encodings) <= _ENCODINGS:
        raise ShardDamaged(
            f"{where}: encodings", found=chunk.encodings, wanted=f"of {sorted(_ENCODINGS)}, no dictionary"
        )
    start, compressed, raw = chunk.data_page_offset, chunk.total_compressed_size, chunk.total_uncompressed_size
    if start < 4 or compressed < 0 or start + compressed > size or raw < 0 or not (plain or raw == compressed):
        raise ShardDamaged(f"{where}: place", found=(start, compressed, raw), wanted=f"inside the {size} bytes")
    return int(raw)


def _differing(found: pa.Schema) -> str:
    """What a schema has too many, too few, or of another type; names of strangers are cut."""
    names = {str(field)[:80] for field in found}
    ours = {str(field) for field in SCHEMA}
    return f"missing {sorted(ours - names)}, unknown {sorted(names - ours)}"[:400]
