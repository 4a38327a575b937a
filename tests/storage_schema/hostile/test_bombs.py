"""A few bytes that declare a huge content are refused before they are decompressed."""

from __future__ import annotations

import struct
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import zstandard

from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.header import HEADER_NAME
from tests.fuzz import shard_rows
from tests.fuzz.children import Child
from tests.fuzz.parquet_parts import PAGE_RAW, Page, Parts, split, with_footer
from tests.fuzz.thrift import I32, I64, STRUCT, Field, Struct, write_struct
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import (
    Read,
    change_document,
    change_parts,
    change_row,
    first_shard,
    written,
)


@pytest.mark.parametrize("size", [1 << 27, 1 << 40, (1 << 64) - 3])
@pytest.mark.parametrize("stream", ["ids", "logprobs", "counts", "draw_ids", "label_logprob"])
def test_a_frame_that_declares_more_than_the_counts_demand_is_not_opened(
    tree: Tree, read: Read, stream: str, size: int
) -> None:
    frame = struct.pack("<IBQ", 0xFD2FB528, 3 << 6 | 1 << 5, size) + struct.pack("<I", (1 << 17) << 3 | 3)[:3] + b"\0"
    change_row(tree, **{stream: frame})
    assert read(tree)["named"]["rows"] == "StreamDamaged"


def test_a_frame_that_holds_more_than_it_declares_is_refused(tree: Tree, read: Read) -> None:
    size = len(zstandard.decompress(shard_rows.rows_of(tree.files[first_shard(tree)])[0]["log_tail"]))
    block = struct.pack("<I", (1 << 17) << 3 | 2)[:3] + b"\0"
    bomb = struct.pack("<IBBQ", 0xFD2FB528, 3 << 6, 171, size) + block * 8000 + struct.pack("<I", 3)[:3] + b"\0"
    change_row(tree, log_tail=bomb)
    assert read(tree)["named"]["rows"] == "StreamDamaged"


@pytest.mark.parametrize("said", [(1 << 31) - 1, 1 << 30, 300 << 20])
def test_a_page_that_declares_more_bytes_than_the_footer_is_not_opened(tree: Tree, read: Read, said: int) -> None:
    """The page's header declares 2 GB, the footer 1 MB; the frame in it is valid, small, and contains zeros."""
    parts = Parts(tree.files[first_shard(tree)])
    chunk = parts.chunks[3]
    page = chunk.pages[0]
    chunk.replace(page, chunk.content(page) + bytes((1 << 20) - 100))
    body_and_footer = parts.to_bytes()
    page.header.set(PAGE_RAW, said, I32)
    body = parts.body()
    honest = Parts(body_and_footer).footer
    for group in honest.get(4).values:
        group.set(2, 1 << 20, I64)
    grown = len(body) - len(split(body_and_footer)[0])
    _shift_places(honest, by=grown, behind=3)
    tree.files[first_shard(tree)] = with_footer(body, write_struct(honest))
    tree.reseal()
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_a_footer_that_declares_two_gigabytes_is_refused_from_the_footer_alone(tree: Tree, read: Read) -> None:
    change_parts(tree, lambda parts: parts.chunks[3].pages[0].header.set(PAGE_RAW, (1 << 31) - 1, I32))
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_a_page_that_holds_more_than_it_declares_is_refused(tree: Tree, read: Read) -> None:
    def fill(parts: Parts) -> None:
        page = parts.chunks[3].pages[0]
        page.body = zstandard.compress(bytes(2 << 30))
        page.seal()

    change_parts(tree, fill)
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_a_column_of_a_hundred_thousand_empty_pages_is_refused(tree: Tree, read: Read) -> None:
    def repeat(parts: Parts) -> None:
        empty = Parts(tree.files[first_shard(tree)]).chunks[3].pages[0]
        empty.body = zstandard.compress(b"")
        empty.header.set(PAGE_RAW, 0, I32)
        empty.header.get(5).set(1, 0, I32)
        empty.seal()
        parts.chunks[3].pages += [empty] * 100_000

    change_parts(tree, repeat)
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("column", [3, 10])
def test_a_dictionary_that_the_footer_does_not_mention_is_refused(tree: Tree, read: Read, column: int) -> None:
    """One value of 7 MiB, named by a thousand rows in ten bytes: 7 GB for a reader that trusts the pages."""
    data = tree.files[first_shard(tree)]
    rows = [shard_rows.rows_of(data)[0]] * 1000
    parts = Parts(shard_rows.write_rows(rows, header=shard_rows.header_of(data)))
    chunk = parts.chunks[column]
    value = bytes(7 << 20)
    dictionary = Page(Struct([Field(1, I32, 2), Field(7, STRUCT, Struct([Field(1, I32, 1), Field(2, I32, 0)]))]), b"")
    chunk.replace(dictionary, struct.pack("<I", len(value)) + value)
    named = deepcopy(chunk.pages[0])
    named.header.get(5).set(2, 8, I32)  # RLE_DICTIONARY
    chunk.replace(named, b"\x01\xd0\x0f\x00")  # a width of one bit, a run of 1,000 zeros
    chunk.pages = [dictionary, named]
    tree.files[first_shard(tree)] = parts.to_bytes()
    tree.reseal()
    tree.recount(0, rows=1000, tokens=1, targets=1)
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("name", ["plan.parquet", "faithfulness.parquet"])
def test_a_dictionary_in_a_small_table_is_refused(tree: Tree, read: Read, name: str) -> None:
    parts = Parts(tree.files[name])
    page = parts.chunks[0].pages[0]
    page.header.get(5).set(2, 8, I32)
    page.seal()
    tree.files[name] = parts.to_bytes()
    tree.reseal()
    assert read(tree)["findings"][0] in ("CommitDamaged", "FileDamaged")


@pytest.mark.parametrize("kept", [0, 1])
def test_the_largest_row_that_the_format_allows_takes_less_than_a_gibibyte(
    tree: Tree, child: Child, tmp_path: Path, kept: int
) -> None:
    """A few kB that stand for 2^24 entries. It is read in four ways, so the limit of 2 s is not asked."""
    positions, width = 4096, 4096
    change_document(
        tree,
        HEADER_NAME,
        lambda header: header.update(
            top_k=width, token_count=1 << 20, vocab_size=1 << 20, max_length=1 << 20, draw_logprobs=False
        ),
    )
    count = np.full(positions, width - kept)
    total = int(count.sum())
    row = dict.fromkeys(STREAMS, b"") | {
        "sample_id": "large",
        "metadata": "{}",
        "media": [],
        "token_ids": np.zeros(positions + 1, np.int32),
        "target_spans": [0, positions],
        "counts": _frame(_planes(count)) if kept else b"",
        "ids": _frame(bytes(total)),
        "logprobs": _frame(bytes(total)),
        "last_levels": _frame(_planes(np.full(positions, 270))),
        "log_tail": _frame(_planes(np.full(positions, 270))),
    }
    name = first_shard(tree)
    tree.files[name] = shard_rows.write_rows([row], header=tree.files[HEADER_NAME])
    tree.files[tree.named("shards/")[1]] = tree.files[name]
    tree.reseal()
    for shard in range(2):
        tree.recount(shard, rows=1, tokens=positions + 1, targets=positions)
    root = written(tree, tmp_path / "dataset")
    answer = child.read(root, cpu_seconds=60.0)
    assert not answer.get("died")
    assert not answer["unnamed"]
    assert "rows" not in answer["named"]


def _planes(values: np.ndarray) -> bytes:
    """Integers below 65,536 as two planes."""
    return np.asarray(values, "<u2").view(np.uint8).reshape(-1, 2).T.tobytes()


def _frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def _shift_places(footer: Struct, *, by: int, behind: int) -> None:
    """Move the places of the column chunks behind number `behind` of a file's first group, and all of later ones."""
    number = 0
    for group in footer.get(4).values:
        for column in group.get(1).values:
            facts = column.get(3)
            if number == behind:
                facts.set(7, facts.get(7) + by, I64)
                facts.set(6, facts.get(6) + by, I64)
            elif number > behind:
                facts.set(9, facts.get(9) + by, I64)
            number += 1
