"""How large the pages of a row group say they are, before any is opened.

Arrow takes the memory that a page's own header asks for; the footer's totals, which `footer.py` bounds, may
say another.
Field numbers are those of the Parquet format's `PageHeader`.
"""

from __future__ import annotations

import pyarrow as pa

from storage_schema.errors import ShardDamaged
from storage_schema.parquet_footer import CODECS, PLAIN, RLE, GroupFacts
from storage_schema.thrift import read_struct

_DATA_PAGE = 0
_MAX_HEADER = 4 << 10
_MAX_PAGES = 1024
"""Four times what the writer makes of the largest row: a header takes as long to look at as a page to open."""


def check_pages(source: pa.NativeFile, group: GroupFacts, *, where: str) -> None:
    """Raise `ShardDamaged` unless the pages of each compressed column chunk fill it exactly, are plain data pages, and
    have together the bytes and values that the footer says."""
    for chunk in group.chunks:
        if CODECS[chunk.codec] == "UNCOMPRESSED":  # takes no more memory than it has bytes
            continue
        at = f"{where}, column {chunk.path}"
        source.seek(chunk.place)
        data = source.read(chunk.stored)
        place = raw = values = pages = 0
        while place < len(data) and pages < _MAX_PAGES:
            length, page_raw, page_values = _page(data[place : place + _MAX_HEADER], at)
            place += length
            raw += page_raw
            values += page_values
            pages += 1
        if (place, raw, values) != (chunk.stored, chunk.raw, chunk.values):
            raise ShardDamaged(
                at,
                found=f"{pages} pages of {place} bytes, {raw} uncompressed, {values} values",
                wanted=f"{chunk.stored} bytes, {chunk.raw} uncompressed, {chunk.values} values",
            )


def _page(data: bytes, where: str) -> tuple[int, int, int]:
    """Bytes of a page with its header, stored and uncompressed, and its values."""
    try:
        header, length = read_struct(data)
        facts = [header[number] for number in (1, 2, 3)]
        facts += [header[5][number] for number in (1, 2, 3, 4)]
        if not all(type(fact) is int for fact in facts):
            raise ValueError("no numbers")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ShardDamaged(
            where, found=f"{type(error).__name__} in a page header: {error}", wanted="whole page headers"
        ) from None
    kind, raw, stored, values, *encodings = facts
    if kind != _DATA_PAGE or encodings != [PLAIN, RLE, RLE] or min(raw, stored, values) < 0:
        raise ShardDamaged(where, found=f"page type {kind}, {facts[1:]}", wanted="plain data pages")
    return length + stored, length + raw, values
