"""Changes that make a hostile dataset of a valid one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import shard_rows
from tests.fuzz.parquet_parts import Parts, split, with_footer
from tests.fuzz.thrift import Struct, write_struct
from tests.fuzz.tree import Tree

Read = Callable[[Tree], dict[str, Any]]
"""What the fixture `read` gives: files in, a child's answer out (`tests/fuzz/oracle.py`)."""

LONG = "9" * 5000


def short(value: str) -> str:
    """A short name of a parameter."""
    return value[:20].strip('"')


def written(tree: Tree, root: Path) -> Path:
    """The files in a folder."""
    for name, data in tree.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def change_document(tree: Tree, name: str, change: Callable[[Any], object]) -> None:
    """Change a JSON document in place."""
    document = json.loads(tree.files[name])
    change(document)
    tree.files[name] = json.dumps(document).encode()


def first_shard(tree: Tree) -> str:
    """The name of the first shard."""
    return tree.named("shards/")[0]


def change_parts(tree: Tree, change: Callable[[Parts], object]) -> None:
    """Change the parts of the first shard, and reseal."""
    parts = Parts(tree.files[first_shard(tree)])
    change(parts)
    tree.files[first_shard(tree)] = parts.to_bytes()
    tree.reseal()


def change_footer(tree: Tree, change: Callable[[Struct], object]) -> None:
    """Change the footer of the first shard behind pages that stay, and reseal."""
    data = tree.files[first_shard(tree)]
    parts = Parts(data)
    change(parts.footer)
    tree.files[first_shard(tree)] = with_footer(split(data)[0], write_struct(parts.footer))
    tree.reseal()


def change_row(tree: Tree, **values: Any) -> None:
    """Other values in the first row of the first shard, under right digests and counts."""
    data = tree.files[first_shard(tree)]
    rows = shard_rows.rows_of(data)
    rows[0].update(values)
    tree.files[first_shard(tree)] = shard_rows.write_rows(rows, header=shard_rows.header_of(data), group_rows=1)
    tree.reseal()


def column_of(group: Struct, path: str) -> Struct:
    """The facts of a column chunk by its path."""
    facts = [chunk.get(3) for chunk in group.get(1).values]
    return next(fact for fact in facts if b".".join(fact.get(3).values).decode() == path)
