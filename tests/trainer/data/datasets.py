"""Sealed datasets whose shards have several small row groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from coldstill.storage_schema.commits import commit_files
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.shard import copy_shard, write_shard
from coldstill.storage_schema.shard.reader import ShardFile
from tests import making


def make_rows(count: int, *, name: str = "row", seed: int = 0, draw_logprobs: bool = False) -> list[CachedRow]:
    """Random rows of 4 to 23 tokens, K = 8, 4 draws."""
    rng = np.random.default_rng(seed)
    rows = [making.random_row(rng, f"{name}-{n}") for n in range(count)]
    if not draw_logprobs:
        return rows
    known = [rng.uniform(-9, -5, row.targets.draw_ids.size).astype(np.float32) for row in rows]
    return [
        replace(row, targets=replace(row.targets, draw_logprobs=logs)) for row, logs in zip(rows, known, strict=True)
    ]


def write_grouped(
    root: Path | str,
    shards: Sequence[Sequence[CachedRow]],
    *,
    header: DatasetHeader,
    tokenizer: Path,
    rows_of_group: int,
) -> str:
    """Write a sealed dataset with a shard per sequence of rows and a row group per `rows_of_group`; return its path."""
    store = making.begin_dataset(root, header, tokenizer, [len(rows) for rows in shards])
    for unit, rows in enumerate(shards):
        data = write_shard(rows, header=header)
        if rows:
            whole = ShardFile(pa.BufferReader(data), size=len(data), codec=None, where="made here").batch(0)
            starts = range(0, len(rows), rows_of_group)
            data = copy_shard((whole.slice(start, rows_of_group) for start in starts), header=header)
        commit_files(
            store,
            unit,
            shard=data,
            rows=len(rows),
            tokens=sum(row.token_ids.size for row in rows),
            targets=sum(row.targets.positions for row in rows),
            environment={},
        )
    seal(store)
    return str(root)


def same(one: Any, other: Any) -> bool:
    """Whether two batches, or parts of them, are bitwise equal."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return all_same(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if hasattr(one, "logprobs"):
        return same(vars(one), vars(other))
    return bool(one == other)


def all_same(batches: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences of batches are bitwise equal."""
    return len(batches) == len(others) and all(same(*pair) for pair in zip(batches, others, strict=True))


def names(batches: Sequence[dict[str, Any]]) -> list[str]:
    """Sample ids in order."""
    return [name for batch in batches for name in batch["sample_ids"]]
