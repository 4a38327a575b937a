"""A Parquet file taken apart into footer and pages, and put together with right places, sizes and checksums."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import zstandard

from .thrift import BINARY, I32, I64, Items, Struct, read_struct, write_struct

SCHEMA, ROW_GROUPS, KEY_VALUES = 2, 4, 5
PAGE_TYPE, PAGE_RAW, PAGE_BYTES, PAGE_CRC, DATA_HEADER = 1, 2, 3, 4, 5
CHUNK_RAW, CHUNK_BYTES, CHUNK_PLACE = 6, 7, 9
_ZSTD = 6
_TAIL = struct.Struct("<I4s")


@dataclass
class Page:
    """A page: its header, and its content as it is stored."""

    header: Struct
    body: bytes

    def seal(self) -> None:
        """Make the header's size and checksum those of the content."""
        self.header.set(PAGE_BYTES, len(self.body), I32)
        crc = zlib.crc32(self.body)
        self.header.set(PAGE_CRC, crc - (1 << 32) if crc >> 31 else crc, I32)


@dataclass
class Chunk:
    """A column of a row group: its facts in the footer, and its pages."""

    facts: Struct
    pages: list[Page]

    @property
    def compressed(self) -> bool:
        """Whether the pages are zstd frames."""
        return bool(self.facts.get(4) == _ZSTD)

    def content(self, page: Page) -> bytes:
        """The content of a page, decompressed."""
        return zstandard.decompress(page.body) if self.compressed else page.body

    def replace(self, page: Page, content: bytes) -> None:
        """Give a page other content, with right sizes and checksums."""
        page.body = zstandard.compress(content) if self.compressed else content
        page.header.set(PAGE_RAW, len(content), I32)
        page.seal()


class Parts:
    """The parts of a Parquet file."""

    def __init__(self, data: bytes):
        length, _ = _TAIL.unpack(data[-_TAIL.size :])
        self.footer, _ = read_struct(data[-_TAIL.size - length : -_TAIL.size])
        self.chunks: list[Chunk] = []
        for group in self.footer.get(ROW_GROUPS).values:
            for column in group.get(1).values:
                facts = column.get(3)
                self.chunks.append(Chunk(facts, _pages(data, facts)))

    @property
    def key_values(self) -> list[Any]:
        """The key-value pairs of the footer, structs of 1 (key) and 2 (value)."""
        pairs = self.footer.get(KEY_VALUES)
        return pairs.values if isinstance(pairs, Items) else []

    def set_header(self, header: bytes) -> None:
        """Put another `dataset.json` into the footer."""
        for pair in self.key_values:
            if pair.get(1) == b"coldstill":
                pair.set(2, header, BINARY)

    def body(self) -> bytes:
        """All that stands before the footer; places and sizes in the footer are made those of the pages."""
        out = bytearray(b"PAR1")
        for chunk in self.chunks:
            start, raw = len(out), 0
            for page in chunk.pages:
                head = write_struct(page.header)
                out += head + page.body
                raw += len(head) + (page.header.get(PAGE_RAW) or 0)
            chunk.facts.set(CHUNK_PLACE, start, I64)
            chunk.facts.set(CHUNK_BYTES, len(out) - start, I64)
            chunk.facts.set(CHUNK_RAW, raw, I64)
        return bytes(out)

    def to_bytes(self) -> bytes:
        """The file."""
        return with_footer(self.body(), write_struct(self.footer))


def with_footer(body: bytes, footer: bytes) -> bytes:
    """A Parquet file of what stands before its footer, and the footer."""
    return body + footer + _TAIL.pack(len(footer), b"PAR1")


def split(data: bytes) -> tuple[bytes, bytes]:
    """What stands before a Parquet file's footer, and the footer."""
    length, _ = _TAIL.unpack(data[-_TAIL.size :])
    return data[: -_TAIL.size - length], data[-_TAIL.size - length : -_TAIL.size]


def _pages(data: bytes, facts: Struct) -> list[Page]:
    place = facts.get(CHUNK_PLACE)
    end = place + facts.get(CHUNK_BYTES)
    pages = []
    while place < end:
        header, start = read_struct(data, place)
        place = start + header.get(PAGE_BYTES)
        pages.append(Page(header, data[start:place]))
    return pages
