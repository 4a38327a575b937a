"""What a stream's rows are taken from: sealed datasets, their shares, how much of each position, where copies lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.rows import CachedRow

from .row_reader import RowReader, RowReference
from .shard_cache import ShardCache
from .thinning import with_fewer_draws


@dataclass(frozen=True, kw_only=True)
class Sources:
    """`datasets`, and `weights`: the share of the rows that comes from each, of any sum. `top_k`, `draws`: how many
    kept ids and draws are used, None for all. `verified`: of each dataset, the local shards whose digest this process
    knows to be right."""

    datasets: Sequence[Dataset]
    weights: Sequence[float]
    top_k: int | None
    draws: int | None
    cache: ShardCache
    verified: Sequence[set[int]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verified", tuple(set() for _ in self.datasets))

    @property
    def rows(self) -> int:
        """Rows of all datasets."""
        return sum(len(dataset) for dataset in self.datasets)

    def reader(self) -> RowReader:
        """A reader for this thread; to be closed."""
        return RowReader(self.datasets, cache=self.cache, verified=self.verified)

    def read(self, reader: RowReader, wanted: Sequence[RowReference], *, seed: int) -> list[CachedRow]:
        """The rows of `wanted`, with as many draws as are used; `seed` chooses which. Raises as `RowReader.rows`."""
        rows = reader.rows(wanted)
        if self.draws is None:
            return rows
        taken = [self.datasets[reference.dataset].header.draws for reference in wanted]
        return [
            with_fewer_draws(row, taken=most, wanted=self.draws, seed=seed) if self.draws < most else row
            for row, most in zip(rows, taken, strict=True)
        ]
