"""Checks and reads the same rows of several datasets, one for each teacher of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.manifest import ShardRecord
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.errors import EnsembleMismatch
from coldstill.trainer.loss_kernels.ensemble import EnsembleTargets
from coldstill.trainer.targets import SparseTargets

from .collate import targets_at
from .row_reader import RowReader, RowReference, Sources

_SAMPLED_PLACES = 4
_MOST_NAMED = 8
_CAPTURE_ALIKE = (
    "capture all of them from one source in mode score or pretrain, with the same settings of source and the same "
    "teacher.max_length"
)


def check_ensemble(datasets: Sequence[Dataset]) -> None:
    """Raise `EnsembleMismatch` unless all datasets seem to have the rows of the first one.

    Compared are the numbers of rows, tokens and targets of each shard, and a few rows. The others are compared when
    they are read. Raises the errors of `Dataset.row` too.
    """
    first = datasets[0]
    for other in datasets[1:]:
        start = _first_difference(first.shards, other.shards)
        if start is not None:
            _raise_difference(first, other, start)
        for number in {int(place) for place in np.linspace(0, len(first) - 1, _SAMPLED_PLACES)}:
            rows = Dataset(first.store).row(number), Dataset(other.store).row(number)
            require_same_row(*rows, number=number, datasets=(first, other))


def require_same_row(mine: CachedRow, other: CachedRow, *, number: int, datasets: tuple[Dataset, Dataset]) -> None:
    """Raise `EnsembleMismatch` unless both rows have the same sample id, tokens, targets and images.

    `number`: of the row in both `datasets`.
    """
    first, second = (dataset.store.url for dataset in datasets)
    what = f"row number {number} of {first} and of {second}"
    if mine.sample_id != other.sample_id:
        raise EnsembleMismatch(
            what,
            found=f"sample ids {mine.sample_id!r} and {other.sample_id!r}",
            wanted="the same rows in the same order in all datasets of data.ensemble",
            fix=_without(datasets, [mine.sample_id], [other.sample_id]),
        )
    if not np.array_equal(mine.token_ids, other.token_ids):
        place = _first_unequal(mine.token_ids, other.token_ids)
        found = f"tokens that differ first at position {place}, in {mine.token_ids.size} and {other.token_ids.size}"
    elif not np.array_equal(mine.target_spans, other.target_spans):
        found = f"target spans {mine.target_spans[:4].tolist()} and {other.target_spans[:4].tolist()}"
    elif [item.sha256 for item in mine.media] != [item.sha256 for item in other.media]:
        found = "other images"
    else:
        return
    raise EnsembleMismatch(
        f"row {mine.sample_id!r}, {what}",
        found=found,
        wanted="the same tokens, targets and images in all datasets of data.ensemble",
        fix=_CAPTURE_ALIKE,
    )


def ensemble_targets(
    sources: Sources,
    reader: RowReader,
    wanted: Sequence[RowReference],
    rows: Sequence[CachedRow],
    targets: SparseTargets,
    *,
    seed: int,
) -> EnsembleTargets:
    """The targets of all teachers at the positions of `targets`, the first one's.

    `rows`: those of `wanted`, of the first dataset. `seed`: of the choice of draws. Raises `EnsembleMismatch`, and what
    `RowReader.rows` raises.
    """
    # The same tensors for all teachers. Another tensor on the same memory would read what is left there after a loader
    # worker has moved the first one to shared memory.
    places: dict[str, Any] = {name: getattr(targets, name) for name in ("labels", "row", "position")}
    arrays = {name: place.numpy() for name, place in places.items()}
    numbers = [reader.number_of(one) for one in wanted]
    teachers = [targets]
    for partner, dataset in enumerate(sources.partners, start=len(sources.datasets)):
        others = sources.read(reader, [reader.reference(partner, number) for number in numbers], seed=seed)
        for mine, other, number in zip(rows, others, numbers, strict=True):
            require_same_row(mine, other, number=number, datasets=(sources.datasets[0], dataset))
        teachers.append(replace(targets_at(others, sources.top_k, **arrays), **places))
    return EnsembleTargets.of(teachers)


def _first_difference(mine: Sequence[ShardRecord], others: Sequence[ShardRecord]) -> int | None:
    """The first shard from which rows may differ; None if no manifest tells, as where the shards have other borders."""
    totals = [[sum(getattr(one, name) for one in records) for name in _COUNTS] for records in (mine, others)]
    plans = [[(one.unit, one.rows + one.rejected) for one in records] for records in (mine, others)]
    if totals[0] == totals[1] and plans[0] != plans[1]:
        return None
    for place, (one, other) in enumerate(zip(mine, others, strict=False)):
        if any(getattr(one, name) != getattr(other, name) for name in _COUNTS):
            return place
    return None if totals[0] == totals[1] else min(len(mine), len(others))


_COUNTS = ("rows", "tokens", "targets")


def _raise_difference(first: Dataset, other: Dataset, shard: int) -> None:
    """Find the first row that differs in shard number `shard` or later, and raise `EnsembleMismatch` for it."""
    start = sum(record.rows for record in first.shards[:shard])
    both = (first, other)
    pairs = zip_longest(first.rows(start), other.rows(start))
    for number, (mine, theirs) in enumerate(pairs, start=start):
        if mine is None or theirs is None or mine.sample_id != theirs.sample_id:
            left = [_ids_from(dataset, number) for dataset in both]
            only = [[id_ for id_ in ids if id_ not in set(others)] for ids, others in (left, left[::-1])]
            raise EnsembleMismatch(
                f"row number {number} of {first.store.url} and of {other.store.url}",
                found=f"{_named(mine)} and {_named(theirs)}; {len(first):,} and {len(other):,} rows in all",
                wanted="the same rows in the same order in all datasets of data.ensemble; a capture rejects rows that "
                "its teacher cannot read",
                fix=_without(both, *only),
            )
        require_same_row(mine, theirs, number=number, datasets=both)


def _named(row: CachedRow | None) -> str:
    return "no row" if row is None else f"sample id {row.sample_id!r}"


def _ids_from(dataset: Dataset, start: int) -> list[str]:
    """Sample ids of the rows from number `start` to the end of its shard and of the next one."""
    stop, shards = start, 0
    for shard, record in enumerate(dataset.shards):
        if record.rows and dataset.first_row(shard) + record.rows > start and shards < 2:
            stop, shards = dataset.first_row(shard) + record.rows, shards + 1
    return [row.sample_id for row in dataset.rows(start, stop)]


def _without(datasets: tuple[Dataset, Dataset], *only: Sequence[str]) -> str:
    """The fix for rows that one of both datasets has, by their sample ids."""
    commands = []
    for dataset, ids in zip(datasets, only, strict=True):
        if ids:
            filters = "".join(f' --filter "sample_id != {name}"' for name in ids[:_MOST_NAMED])
            commands.append(f"`coldstill subset {dataset.store.url} OUTPUT{filters}`")
    if not commands:
        return _CAPTURE_ALIKE
    return f"remove rows that only one of them has, with {' and '.join(commands)}; or {_CAPTURE_ALIKE}"


def _first_unequal(mine: np.ndarray, other: np.ndarray) -> int:
    both = min(mine.size, other.size)
    unequal = np.flatnonzero(mine[:both] != other[:both])
    return int(unequal[0]) if unequal.size else both
