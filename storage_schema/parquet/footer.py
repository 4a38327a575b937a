"""What a Parquet footer says of its column chunks, read by our own code. A footer's bytes in, `FooterFacts` out.

pyarrow ends the process where a footer names a codec that it does not know (its accessors let C++ exceptions through),
and takes memory by the number of values that a footer names. So a footer from a stranger is judged before it sees it.
Field numbers are those of the Parquet format's `FileMetaData`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from .thrift import Fields, read_struct

CODECS = {0: "UNCOMPRESSED", 6: "ZSTD"}
PLAIN, RLE = 0, 3

_ENCRYPTION = {8, 9}
_FILE_PATH_AND_ENCRYPTION = {1, 8, 9}
_INDEX_AND_DICTIONARY = {10, 11}

_TAIL = struct.Struct("<I4s")
TAIL_BYTES = _TAIL.size
"""The length of the footer and four letters, at the end of every file."""


class ChunkFacts(NamedTuple):
    """A column of a row group: its `path` in the schema, joined by dots, the pages' `codec` and `encodings`, its
    `values` (list elements, nulls and empty lists count), bytes uncompressed (`raw`) and `stored` from `place` on;
    `other_pages`: whether there are pages of a dictionary or an index too."""

    path: str
    codec: int
    encodings: frozenset[int]
    values: int
    raw: int
    stored: int
    place: int
    other_pages: bool


class GroupFacts(NamedTuple):
    """A row group."""

    rows: int
    chunks: list[ChunkFacts]


class FooterFacts(NamedTuple):
    """A file. `key_values`: its own metadata."""

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
    """The facts of a footer without its length and magic. Raises `ValueError` for one that does not parse, is
    encrypted or points into other files; no number in it is checked."""
    try:
        fields, end = read_struct(footer)
        if end != len(footer):
            raise ValueError(f"{len(footer) - end} bytes after it")
        if _ENCRYPTION & fields.keys():
            raise ValueError("encryption")
        pairs = [(_bytes(pair, 1), _bytes(pair, 2)) for pair in fields.get(5, [])]
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        groups = [GroupFacts(_integer(group, 3), [_chunk(chunk) for chunk in group[1]]) for group in fields[4]]
        return FooterFacts(_integer(fields, 3), groups, dict(pairs))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


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
        raise ValueError(f"field {number} is no number")
    return value


def _bytes(fields: Fields, number: int) -> bytes:
    value = fields[number]
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is no text")
    return value
