"""Parquet files with changed pages or footers, whose checksums, places and sizes are correct again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from copy import deepcopy

import zstandard

from . import byte_changes
from .parquet_parts import PAGE_BYTES, PAGE_RAW, Page, Parts, split, with_footer
from .thrift import BINARY, DOUBLE, I32, I64, LIST, STRUCT, TRUE, Field, Items, Struct, all_fields, write_struct


def change(rng: random.Random, data: bytes) -> bytes:
    """A Parquet file after one change below its columns."""
    return rng.choice(_CHANGES)(rng, data)


def _some_page(rng: random.Random, parts: Parts) -> tuple[int, Page]:
    place = rng.choice([place for place, chunk in enumerate(parts.chunks) if chunk.pages])
    return place, rng.choice(parts.chunks[place].pages)


def page_content(rng: random.Random, data: bytes) -> bytes:
    """Levels, lengths and values changed, in pages of right checksum."""
    parts = Parts(data)
    place, page = _some_page(rng, parts)
    chunk = parts.chunks[place]
    content = chunk.content(page)
    if rng.random() < 0.5:
        chunk.replace(page, byte_changes.change(rng, content))
    else:  # one number, where lengths and levels stand
        at = rng.randrange(max(len(content) - 3, 1))
        value = rng.choice(byte_changes.INTERESTING) & (1 << 32) - 1
        chunk.replace(page, content[:at] + struct.pack("<I", value)[: len(content) - at] + content[at + 4 :])
    return parts.to_bytes()


def page_header(rng: random.Random, data: bytes) -> bytes:
    """A field of a page header changed, removed or added; the footer follows, but for sizes that lie."""
    parts = Parts(data)
    _, page = _some_page(rng, parts)
    if rng.random() < 0.3:
        page.header.set(rng.choice((PAGE_RAW, PAGE_BYTES)), rng.choice(byte_changes.INTERESTING), I32)
    else:
        _change_struct(rng, page.header)
    try:
        return parts.to_bytes()
    except (TypeError, ValueError, struct.error):  # a size of another type: the footer cannot follow
        return data


def footer_field(rng: random.Random, data: bytes) -> bytes:
    """A field of the footer changed, removed or added."""
    parts = Parts(data)
    for _ in range(rng.choice((1, 1, 2))):
        _change_struct(rng, parts.footer)
    try:
        return with_footer(split(data)[0], write_struct(parts.footer))
    except (TypeError, ValueError, struct.error, AttributeError):
        return data


def footer_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes of the footer changed, its length right."""
    body, footer = split(data)
    return with_footer(body, byte_changes.change(rng, footer))


def lying_numbers(rng: random.Random, data: bytes) -> bytes:
    """Rows, values, sizes or places in the footer that are not those of the pages."""
    parts = Parts(data)
    value = rng.choice(byte_changes.INTERESTING)
    group = rng.choice(parts.footer.get(4).values or [Struct()])
    facts = rng.choice(parts.chunks).facts
    body = parts.body()
    rng.choice(
        (
            lambda: parts.footer.set(3, value, I64),
            lambda: group.set(3, value, I64),
            lambda: (parts.footer.set(3, value, I64), group.set(3, value, I64)),
            lambda: facts.set(rng.choice((5, 6, 7, 9, 10, 11)), value, I64),
            lambda: parts.footer.get(4).values.append(deepcopy(group)),
            lambda: parts.footer.get(4).values.clear(),
        )
    )()
    return with_footer(body, write_struct(parts.footer))


def move_pages(rng: random.Random, data: bytes) -> bytes:
    """Pages swapped between columns, twice, or left out."""
    parts = Parts(data)
    first, page = _some_page(rng, parts)
    second, other = _some_page(rng, parts)
    mine, theirs = parts.chunks[first].pages, parts.chunks[second].pages
    rng.choice(
        (
            lambda: (mine.insert(mine.index(page), other), theirs.remove(other)),
            lambda: mine.append(page),
            lambda: mine.remove(page),
            lambda: mine.insert(0, _dictionary_page()),
            lambda: setattr(parts.chunks[first], "pages", [page] * 50),
        )
    )()
    return parts.to_bytes()


def huge_page(rng: random.Random, data: bytes) -> bytes:
    """A page that declares, or has, far more than its neighbors: from some MiB to 2 GiB."""
    parts = Parts(data)
    place, page = _some_page(rng, parts)
    chunk = parts.chunks[place]
    size = rng.choice((1 << 20, 7 << 20, 9 << 20, 1 << 28, (1 << 31) - 1))
    if chunk.compressed and size <= 9 << 20:
        content = chunk.content(page)
        page.body = zstandard.compress(content + bytes(size - len(content)))
        page.header.set(PAGE_RAW, size, I32)
        page.seal()
    else:
        page.header.set(PAGE_RAW, size, I32)
    if rng.random() < 0.3:  # the page's frame does not declare its size
        page.body = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
        page.seal()
    return parts.to_bytes()


def _dictionary_page() -> Page:
    header = Struct([Field(1, I32, 2)])
    page = Page(header, struct.pack("<I", 3) + b"abc")
    header.set(PAGE_RAW, len(page.body), I32)
    page.seal()
    header.set(7, Struct([Field(1, I32, 1), Field(2, I32, 0)]), STRUCT)
    return page


def _change_struct(rng: random.Random, root: Struct) -> None:
    holder, item = rng.choice(all_fields(root))
    place = holder.fields.index(item)
    action = rng.choice(("value", "value", "value", "remove", "twice", "kind", "add", "deep"))
    if action == "value":
        item.value = _other_value(rng, item)
    elif action == "remove":
        del holder.fields[place]
    elif action == "twice":
        holder.fields.insert(place, item)
    elif action == "kind":
        item.kind, item.value = rng.choice(((I64, 1), (BINARY, b"x"), (DOUBLE, 1.0), (TRUE, None), (STRUCT, Struct())))
    elif action == "add":
        number = rng.choice((item.number + 1, 14, 100, 32_767, -3))
        holder.fields.append(
            Field(number, *rng.choice(((I64, 1), (BINARY, b"x" * 5000), (LIST, Items(I32, [1] * 99)))))
        )
    else:
        inner = Struct()
        for _ in range(rng.choice((5, 11, 20, 60, 150))):
            inner = Struct([Field(1, STRUCT, inner)])
        holder.fields.append(Field(30, STRUCT, inner))


def _other_value(rng: random.Random, item: Field) -> object:
    if isinstance(item.value, int):
        return rng.choice((*byte_changes.INTERESTING, item.value + 1, item.value - 1))
    if isinstance(item.value, bytes):
        return byte_changes.change(rng, item.value)
    if isinstance(item.value, Items) and item.value.values:
        values = list(item.value.values)
        place = rng.randrange(len(values))
        return Items(
            item.value.kind,
            rng.choice((values[:place] + values[place + 1 :], values + values, values[::-1], [], values * 100)),
        )
    return item.value


_CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    page_content, page_content, page_header, footer_field, footer_field, footer_bytes, lying_numbers, move_pages,
    huge_page,
)  # fmt: skip
