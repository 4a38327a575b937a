"""Parquet footers that no writer of ours makes."""

from __future__ import annotations

import pyarrow as pa
import pytest

from coldstill.storage_schema.shard import SCHEMA
from tests.fuzz import shard_rows
from tests.fuzz.parquet_parts import Parts
from tests.fuzz.thrift import BINARY, I32, I64, STRUCT, Field, Struct
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import (
    Read,
    change_footer,
    column_of,
    first_shard,
)


@pytest.mark.parametrize("codec", [-1, 1, 2, 3, 4, 5, 7, 8, 1 << 20, (1 << 32) + 6])
@pytest.mark.parametrize("column", ["metadata", "ids"])
def test_an_unknown_compression_does_not_end_the_process(tree: Tree, read: Read, column: str, codec: int) -> None:
    """pyarrow aborts where its `compression` accessor meets a codec that it does not know."""
    change_footer(tree, lambda footer: column_of(footer.get(4).values[0], column).set(4, codec, I32))
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("name", ["plan.parquet", "faithfulness.parquet"])
def test_an_unknown_compression_of_a_small_table_does_not_end_the_process(tree: Tree, read: Read, name: str) -> None:
    parts = Parts(tree.files[name])
    parts.chunks[0].facts.set(4, -1, I32)
    tree.files[name] = parts.to_bytes()
    tree.reseal()
    assert "Damaged" in read(tree)["findings"][0]


@pytest.mark.parametrize("depth", [5, 60, 400])
def test_a_footer_that_is_too_deep_is_named(tree: Tree, read: Read, depth: int) -> None:
    def nest(footer: Struct) -> None:
        inner = Struct()
        for _ in range(depth):
            inner = Struct([Field(1, STRUCT, inner)])
        footer.fields.append(Field(99, STRUCT, inner))

    change_footer(tree, nest)
    assert read(tree)["named"].get("rows") == (None if depth == 5 else "ShardDamaged")


def test_row_groups_that_share_their_pages_are_refused(tree: Tree, read: Read) -> None:
    """A small file would be a large dataset."""

    def repeat(footer: Struct) -> None:
        groups = footer.get(4).values
        groups += [groups[0]] * 199
        footer.set(3, 200 * groups[0].get(3), I64)

    change_footer(tree, repeat)
    tree.recount(0, rows=600, tokens=1, targets=1)
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_a_column_in_another_file_is_refused(tree: Tree, read: Read) -> None:
    def point(footer: Struct) -> None:
        footer.get(4).values[0].get(1).values[0].fields.insert(0, Field(1, BINARY, b"/etc/passwd"))

    change_footer(tree, point)
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_a_null_where_none_belongs_is_refused(tree: Tree, read: Read) -> None:
    data = tree.files[first_shard(tree)]
    table = pa.Table.from_pylist(shard_rows.rows_of(data), schema=SCHEMA)
    for name in ("sample_id", "token_ids", "ids", "media"):
        column = table.schema.get_field_index(name)
        field = SCHEMA.field(name)
        nulls = pa.array([None] * table.num_rows, field.type)
        spoilt = table.set_column(column, field.with_nullable(True), nulls)
        header = shard_rows.header_of(data)
        changed = Tree(tree.files)
        changed.files[first_shard(tree)] = shard_rows.write_table(spoilt, header=header)
        changed.reseal()
        assert read(changed)["named"]["rows"] == "ShardDamaged"
