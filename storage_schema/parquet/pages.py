"""What the pages of a column chunk say of themselves, before Arrow opens one.

Arrow takes the memory that a page's own header asks for, and believes it where it names an encoding: a dictionary that
the footer does not mention turns a few bytes into gigabytes. Field numbers are those of the format's `PageHeader`.
"""

from __future__ import annotations

from .footer import PLAIN, RLE, ChunkFacts
from .thrift import read_struct

_DATA_PAGE = 0
_MAX_HEADER = 64 << 10
"""Four times the longest that is written: one with the least and the greatest sample id, of 4 kB each, twice."""
_MAX_PAGES = 1024
"""Four times what the writer makes of the largest row: a header takes as long to look at as a page to open."""


def check_pages(data: memoryview, chunk: ChunkFacts) -> None:
    """Raise `ValueError` unless the pages in `data`, the stored bytes of `chunk`, fill it exactly, are plain data
    pages, and have together the bytes and values that the footer says."""
    place = raw = values = pages = 0
    while place < len(data) and pages < _MAX_PAGES:
        length, page_raw, page_values = _page(bytes(data[place : place + _MAX_HEADER]))
        place += length
        raw += page_raw
        values += page_values
        pages += 1
    if place != len(data) or (place, raw, values) != (chunk.stored, chunk.raw, chunk.values):
        raise ValueError(
            f"column {chunk.path}: {pages} pages of {place} bytes, {raw} uncompressed, {values} values; "
            f"the footer says {chunk.stored}, {chunk.raw} and {chunk.values}"
        )


def _page(data: bytes) -> tuple[int, int, int]:
    """Bytes of a page with its header, stored and uncompressed, and its values."""
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
    return length + stored, length + raw, values
