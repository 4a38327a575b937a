"""The columns and bounds of a shard, and the check of its footer against them.

Plain columns can be read by any Parquet reader: a shard is an SFT dataset without our code. Each codec stream is a
`binary` column with one frame per row, so that a row can be decoded alone.

The footer is checked by our own code before any page is read: bounds first, then structure. A codec, encoding, column
or count that the format does not use is rejected from the footer alone, so that a file from a stranger reaches no more
of the Parquet reader than our own files do.
"""

from __future__ import annotations

import re
from itertools import zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.errors import ShardDamaged
from coldstill.storage_schema.header import MAX_HEADER_BYTES, MAX_TOKENS, DatasetHeader
from coldstill.storage_schema.parquet import (
    CODECS,
    PLAIN,
    RLE,
    TAIL_BYTES,
    ChunkFacts,
    FooterFacts,
    GroupFacts,
    footer_length,
    list_of,
    read_footer,
    required,
)

_MEDIA = pa.struct(
    [
        required("position", pa.int32()),
        required("type", pa.string()),
        required("sha256", pa.string()),
        pa.field("path", pa.string()),
        pa.field("bytes", pa.binary()),
    ]
)

PLAIN_COLUMNS = ("sample_id", "token_ids", "target_spans", "metadata", "media")
SCHEMA = pa.schema(
    [
        required("sample_id", pa.string()),
        required("token_ids", list_of(pa.int32())),
        required("target_spans", list_of(pa.int32())),
        required("metadata", pa.string()),
        required("media", list_of(_MEDIA)),
        *(required(name, pa.binary()) for name in STREAMS),
    ]
)


def _leaves(field: pa.Field, path: str) -> list[str]:
    if pa.types.is_list(field.type):
        return _leaves(field.type.value_field, f"{path}.list.element")
    if pa.types.is_struct(field.type):
        return [leaf for inner in field.type for leaf in _leaves(inner, f"{path}.{inner.name}")]
    return [path]


LEAF_PATHS = tuple(leaf for field in SCHEMA for leaf in _leaves(field, field.name))
"""The columns by their Parquet names, for instance `token_ids.list.element`."""

FOOTER_KEY = b"coldstill"
MAX_METADATA_BYTES = 1 << 20
"""Maximum bytes of a row's sample id and metadata together."""
MAX_METADATA_DEPTH = 1000
"""Maximum nesting of a row's metadata. Python up to 3.12 cannot parse deeper JSON, and later ones can: without a bound,
a dataset could be read on some machines only."""
MAX_SHARD_BYTES = 500_000_000
MAX_GROUP_ROWS = 1024
MAX_GROUP_BYTES = 8 << 20
"""A row group is the unit of random access in pyarrow: with this bound a random row costs one small read."""
MAX_ROW_BYTES = 256 << 20
"""A row that is larger than a group is stored as its own group."""

MAX_FOOTER_BYTES = 4 << 20
"""Room for the header and for 2,300 row groups of 1.3 kB each. Checking this much takes two seconds."""
_MAX_GROUPS = 1 << 16
_GROUP_SLACK = 1 << 20
"""Page headers and levels, which the writer's count does not include."""
_ENCODINGS = {PLAIN, RLE}
_NUMBER_BYTES = 4
_MOST_BYTES_OF_A_ROW = {
    "sample_id": MAX_METADATA_BYTES,
    "metadata": MAX_METADATA_BYTES,
    "token_ids.list.element": _NUMBER_BYTES * MAX_TOKENS,
    "target_spans.list.element": 2 * _NUMBER_BYTES * MAX_TOKENS,
}
"""Other columns are bounded by the size of a row group only."""
_NO_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[^][{}"]+', re.DOTALL)
"""Strings of JSON, and everything else that is not a bracket. A string without an end takes the rest of the text: each
quote in it would be tried as another start."""


def is_too_deep(json_text: bytes) -> bool:
    """Whether JSON is nested deeper than `MAX_METADATA_DEPTH`."""
    if json_text.count(b"[") + json_text.count(b"{") <= MAX_METADATA_DEPTH:
        return False  # nearly every row
    brackets = np.frombuffer(_NO_BRACKETS.sub(b"", json_text), np.uint8)
    opening = np.isin(brackets, np.frombuffer(b"[{", np.uint8))
    return bool(np.cumsum(np.where(opening, 1, -1)).max(initial=0) > MAX_METADATA_DEPTH)


def open_parquet(source: pa.NativeFile, *, size: int, where: str) -> tuple[pq.ParquetFile, FooterFacts]:
    """The Parquet file in `source` of `size` bytes, and the facts of its checked footer. Raises `ShardDamaged`."""
    if not 12 <= size <= MAX_SHARD_BYTES + MAX_FOOTER_BYTES:
        raise ShardDamaged(where, found=f"{size} bytes", wanted=f"12 to {MAX_SHARD_BYTES}")
    facts = _facts(source, size, where)
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
        differing = "" if found.equals(SCHEMA) else _differing(found)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardDamaged(
            where, found=f"{type(error).__name__}: {error}"[:300], wanted="a whole Parquet file"
        ) from None
    if differing:
        raise ShardDamaged(f"{where}: columns", found=differing, wanted="the columns of FORMAT.md")
    return file, facts


def footer_header(facts: FooterFacts, *, where: str) -> DatasetHeader:
    """The header in the footer. Raises `ShardDamaged`, `InvalidHeader`, `UnsupportedFormat`."""
    if FOOTER_KEY not in facts.key_values:
        raise ShardDamaged(f"{where}: footer", found="no header", wanted=f"key {FOOTER_KEY.decode()!r}")
    return DatasetHeader.from_bytes(facts.key_values[FOOTER_KEY], where=f"{where}: footer")


def _facts(source: pa.NativeFile, size: int, where: str) -> FooterFacts:
    source.seek(size - TAIL_BYTES)
    try:
        length = footer_length(source.read(TAIL_BYTES), size=size, most=MAX_FOOTER_BYTES)
    except ValueError as error:
        raise ShardDamaged(where, found=str(error), wanted="a whole Parquet file") from None
    source.seek(size - TAIL_BYTES - length)
    try:
        facts = read_footer(source.read(length))
    except ValueError as error:
        raise ShardDamaged(f"{where}: footer", found=str(error)[:300], wanted="a Parquet footer") from None
    end = 4
    for number, group in enumerate(facts.groups):
        end = _check_group(group, end, size - length, f"{where}: row group {number}")
    rows = sum(group.rows for group in facts.groups)
    if rows != facts.rows:
        raise ShardDamaged(f"{where}: rows", found=f"{rows} in row groups", wanted=f"{facts.rows}")
    return facts


def _check_group(group: GroupFacts, start: int, size: int, where: str) -> int:
    """Checks a row group whose pages begin at `start` or later. Returns the offset of their end."""
    if not 1 <= group.rows <= MAX_GROUP_ROWS:
        raise ShardDamaged(f"{where}: rows", found=group.rows, wanted=f"1 to {MAX_GROUP_ROWS}")
    for chunk, path in zip_longest(group.chunks, LEAF_PATHS):
        if chunk is None or chunk.path != path:
            raise ShardDamaged(f"{where}: columns", found=chunk and chunk.path[:80], wanted=path)
        start = _check_chunk(chunk, start, size, f"{where}, column {path}")
        most = _GROUP_SLACK + group.rows * _MOST_BYTES_OF_A_ROW.get(path, MAX_ROW_BYTES)
        if chunk.raw > most:
            raise ShardDamaged(f"{where}, column {path}: size", found=f"{chunk.raw} bytes", wanted=f"at most {most}")
        if not 0 <= chunk.values - group.rows <= _most_elements(chunk, group):
            raise ShardDamaged(f"{where}, column {path}: values", found=chunk.values, wanted="those of its rows")
    total = sum(chunk.raw for chunk in group.chunks)
    bound = _GROUP_SLACK + (MAX_ROW_BYTES if group.rows == 1 else MAX_GROUP_BYTES)
    if total > bound:
        raise ShardDamaged(f"{where}: size", found=f"{total} bytes", wanted=f"at most {bound}")
    return start


def _check_chunk(chunk: ChunkFacts, start: int, size: int, where: str) -> int:
    """Checks a column chunk that begins at `start` or later. Returns the offset of its end."""
    plain = chunk.path.split(".")[0] in PLAIN_COLUMNS
    codec, wanted = CODECS.get(chunk.codec, chunk.codec), "ZSTD" if plain else "UNCOMPRESSED"
    if codec != wanted:
        raise ShardDamaged(f"{where}: compression", found=codec, wanted=wanted)
    if chunk.other_pages or not chunk.encodings <= _ENCODINGS:
        raise ShardDamaged(f"{where}: encodings", found=sorted(chunk.encodings), wanted="plain, no dictionary")
    end = chunk.place + chunk.stored
    if not start <= chunk.place <= end <= size or chunk.raw < 0 or not (plain or chunk.raw == chunk.stored):
        raise ShardDamaged(
            f"{where}: place", found=(chunk.place, chunk.stored, chunk.raw), wanted=f"between {start} and {size}"
        )
    return end


def _most_elements(chunk: ChunkFacts, group: GroupFacts) -> int:
    """How many list elements a chunk may have: Arrow allocates memory for as many values as the footer names.

    The members of a media reference have as many values as its first member, a number; nulls take no bytes.
    """
    if ".list." not in chunk.path:
        return 0
    first = group.chunks[LEAF_PATHS.index("media.list.element.position")] if chunk.path.startswith("media.") else chunk
    return first.raw // _NUMBER_BYTES


def _differing(found: pa.Schema) -> str:
    """The missing and the unknown columns of a schema; long names are cut."""
    names = {str(field)[:80] for field in found}
    ours = {str(field) for field in SCHEMA}
    return f"missing {sorted(ours - names)}, unknown {sorted(names - ours)}"[:400]
