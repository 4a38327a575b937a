"""Writes the data of the loader's benchmark: sealed datasets and naive Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.codec.ours import our_header
from benchmarks.codec.rivals import NaiveLists
from benchmarks.codec.sides import Case
from benchmarks.inputs.teacher_distributions import Distributions
from benchmarks.inputs.teacher_rows import DRAWS, Limits, narrowed
from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_to_bytes
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store

FLOOR = 1e-4
ROWS_OF_SHARD = 120


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A teacher at one K: the sealed datasets `plain` and `drawn`, and the plain rows as naive lists.

    Each has `targets` target positions.
    """

    sharpness: str
    top_k: int
    folder: Path
    targets: int

    @property
    def plain(self) -> str:
        """The dataset that keeps K ids at every position, without draws."""
        return str(self.folder / "plain")

    @property
    def drawn(self) -> str:
        """The dataset with a floor and draws, as a capture writes by default."""
        return str(self.folder / "drawn")

    @property
    def naive(self) -> Path:
        """Folder with the files of `NaiveLists` and their tokens."""
        return self.folder / "naive"


def store(distributions: Distributions, *, sharpness: str, top_k: int, copies: int, folder: Path) -> Stored:
    """Write the test rows `copies` times in each form, with unique names."""
    plain, drawn = Limits(top_k=top_k), Limits(top_k=top_k, min_prob=FLOOR, draws=DRAWS)
    for name, limits in (("plain", plain), ("drawn", drawn)):
        rows = [narrowed(row, limits) for row in distributions.test]
        named = [replace(row, sample_id=f"{row.sample_id}-{copy}") for copy in range(copies) for row in rows]
        shards = [named[start : start + ROWS_OF_SHARD] for start in range(0, len(named), ROWS_OF_SHARD)]
        _seal(folder / name, shards, Case(sharpness=sharpness, limits=limits, rows=shards[0]))
        if limits is plain:
            _write_naive(folder / "naive", shards, top_k)
    targets = sum(row.targets.positions for row in named)
    return Stored(sharpness=sharpness, top_k=top_k, folder=folder, targets=targets)


def _seal(root: Path, shards: Sequence[Sequence[CachedRow]], case: Case) -> None:
    directory = Store(root)
    header = our_header(case, "fine")
    directory.create(HEADER_NAME, header.to_bytes())
    starts = np.cumsum([0, *map(len, shards)]).tolist()
    plan = [Unit(n, start, start, len(rows)) for n, (start, rows) in enumerate(zip(starts, shards, strict=False))]
    directory.create(PLAN_NAME, plan_to_bytes(plan))
    for unit, rows in enumerate(shards):
        commit_unit(directory, unit, rows=rows, rejects=[], header=header, environment={})
    seal(directory)


def _write_naive(folder: Path, shards: Sequence[Sequence[CachedRow]], top_k: int) -> None:
    folder.mkdir(parents=True)
    for number, rows in enumerate(shards):
        (data,) = NaiveLists(top_k=top_k).encode(rows)
        (folder / f"{number}.lists").write_bytes(data)
        tokens = pa.array([row.token_ids for row in rows], pa.list_(pa.int32()))
        labels = pa.array([row.targets.label_logprob for row in rows], pa.list_(pa.float32()))
        table = pa.table({"tokens": tokens, "label_logprob": labels})
        pq.write_table(table, folder / f"{number}.tokens", compression="zstd")
