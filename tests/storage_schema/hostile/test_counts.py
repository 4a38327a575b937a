"""Wrong counts in the manifest, commit records, footers, pages and streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
import zstandard

from coldstill.storage_schema.manifest import MANIFEST_NAME
from tests.fuzz import shard_rows
from tests.fuzz.thrift import I32, I64, Struct
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import (
    LONG,
    Read,
    change_document,
    change_footer,
    change_parts,
    change_row,
    column_of,
    first_shard,
    short,
)


@pytest.mark.parametrize("name", ["rows", "tokens", "targets", "rejected"])
@pytest.mark.parametrize("value", [-1, 0, 4, 1 << 40, 1 << 63, 10**30, 2.5, True, "3"])
def test_sums_in_the_manifest(tree: Tree, read: Read, name: str, value: object) -> None:
    if json.loads(tree.files[MANIFEST_NAME])[name] != value:
        change_document(tree, MANIFEST_NAME, lambda document: document.update({name: value}))
        assert read(tree)["named"]["open"] == "CommitDamaged"


@pytest.mark.parametrize("name", ["rows", "tokens", "targets", "rejected"])
@pytest.mark.parametrize("value", [(1 << 53) + 1, 1 << 63, 1 << 64, 10**40])
def test_sums_that_add_up_to_more_than_any_dataset_has(tree: Tree, read: Read, name: str, value: int) -> None:
    def lie(document: Any) -> None:
        for shard in document["shards"]:
            shard[name] = 0
        document["shards"][0][name] = document[name] = value

    change_document(tree, MANIFEST_NAME, lie)
    assert read(tree)["named"]["open"] == "CommitDamaged"


@pytest.mark.parametrize("units", [(0, 0), (1, 0)])
def test_units_of_shards_that_are_not_distinct_and_in_order(tree: Tree, read: Read, units: tuple[int, int]) -> None:
    """Programs that write one file for each unit would write one over the other."""

    def lie(document: Any) -> None:
        for shard, unit in zip(document["shards"], units, strict=False):
            shard["unit"] = unit

    change_document(tree, MANIFEST_NAME, lie)
    assert read(tree)["named"]["open"] == "CommitDamaged"


@pytest.mark.parametrize("name", ["\u00b2", "\u0663", "0000000", "1", "-1", "9" * 200, "x", ""])
def test_files_beside_commit_records_are_no_units(tree: Tree, read: Read, name: str) -> None:
    tree.files[f"commits/{name}.json"] = b"{}"
    assert read(tree)["named"].get("commits") == ("CommitDamaged" if name == "9" * 200 else None)


@pytest.mark.parametrize("name", ["rows", "tokens", "targets"])
def test_counts_of_a_shard_in_the_manifest(tree: Tree, read: Read, name: str) -> None:
    def lie(document: Any) -> None:
        document["shards"][0][name] += 1
        document[name] += 1

    change_document(tree, MANIFEST_NAME, lie)
    assert "ShardDamaged" in read(tree)["findings"]


@pytest.mark.parametrize("name", ["unit", "rows", "tokens", "targets", "rejected"])
@pytest.mark.parametrize("text", ["-1", LONG, "1e400", "NaN", "1.5", '"1"', "null", "[1]"], ids=short)
def test_counts_of_a_commit_record(tree: Tree, read: Read, name: str, text: str) -> None:
    change_document(tree, "commits/000000.json", lambda document: document.update({name: "MARK"}))
    tree.files["commits/000000.json"] = tree.files["commits/000000.json"].replace(b'"MARK"', text.encode())
    assert read(tree)["named"]["commits"] == "CommitDamaged"


@pytest.mark.parametrize("value", [-1, 0, 2, 4, 1025, 1 << 20, 1 << 31, 1 << 62])
def test_rows_of_a_row_group(tree: Tree, read: Read, value: int) -> None:
    def lie(footer: Struct) -> None:
        footer.set(3, value, I64)
        footer.get(4).values[0].set(3, value, I64)

    change_footer(tree, lie)
    if 0 < value <= 1024:
        tree.recount(0, rows=value, tokens=1, targets=1)
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("column", ["sample_id", "token_ids.list.element", "media.list.element.path", "ids"])
@pytest.mark.parametrize("value", [-1, 0, 1 << 20, 1 << 28, 1 << 40, 1 << 62])
def test_values_of_a_column_in_the_footer(tree: Tree, read: Read, column: str, value: int) -> None:
    change_footer(tree, lambda footer: column_of(footer.get(4).values[0], column).set(5, value, I64))
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("chunk", [0, 1, 8])
@pytest.mark.parametrize("value", [-1, 0, 1 << 28, (1 << 31) - 1])
def test_values_of_a_page(tree: Tree, read: Read, chunk: int, value: int) -> None:
    change_parts(tree, lambda parts: parts.chunks[chunk].pages[0].header.get(5).set(1, value, I32))
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("value", [0, 9, 255])
def test_kept_ids_of_a_position(tree: Tree, read: Read, value: int) -> None:
    row = shard_rows.rows_of(tree.files[first_shard(tree)])[0]
    content = zstandard.decompress(row["counts"])
    change_row(tree, counts=zstandard.compress(bytes([value]) * len(content)))
    assert read(tree)["named"]["rows"] == "StreamDamaged"
