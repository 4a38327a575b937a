"""Endless row references: of one dataset in shuffled order, and of several datasets mixed by weight.

The order within a dataset is a function of (seed, epoch). Shards are shuffled, then the row groups of each shard. Four
consecutive row groups, of one shard or of several small ones, form a window, and the rows of a window are shuffled
together. So a few row groups are in memory, never a whole shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypedDict

import numpy as np

from .rng import MIXTURE_BLOCK, Purpose, mixture_uniforms, permutation
from .row_reader import RowReader, RowReference

WINDOW_GROUPS = 4
"""Row groups of a window, at most 32 MiB and 4,096 rows: enough to separate neighbors of the source."""

_PREFETCH_BYTES = 64 << 20
"""Bytes prepared behind the shard being read: the next shard, or several small ones."""


class ShuffledRows:
    """Rows of dataset number `dataset` of `reader`, from the start of epoch 0 or from the place given to `seek`."""

    def __init__(self, reader: RowReader, dataset: int, *, seed: int, shuffle: bool):
        self._reader, self._dataset, self._seed, self._shuffle = reader, dataset, seed, shuffle
        # A work unit whose rows were all rejected has an empty shard.
        self._shards = np.array([n for n, shard in enumerate(reader.datasets[dataset].shards) if shard.rows], np.int64)
        self.seek((0, 0, 0, 0))

    def seek(self, cursor: Sequence[int]) -> None:
        """Continue from a place that `cursor` returned."""
        self._epoch, self._shard, self._group, self._row = cursor
        self._next = (self._epoch, self._shard, self._group)
        self._window: list[RowReference] | None = None

    def cursor(self) -> tuple[int, int, int, int]:
        """The epoch; the places, in its order, of the shard and row group that begin the window; its rows returned."""
        return self._epoch, self._shard, self._group, self._row

    def __iter__(self) -> Iterator[RowReference]:
        return self

    def __next__(self) -> RowReference:
        """The next row. Raises what `RowReader.rows` raises."""
        if self._window is None:
            self._window = self._read_window()
        while self._row == len(self._window):  # a window may hold no row that is used
            self._epoch, self._shard, self._group = self._next
            self._row, self._window = 0, self._read_window()
        self._row += 1
        return self._window[self._row - 1]

    def _read_window(self) -> list[RowReference]:
        """The rows of the window that begins here. Also sets where the next window begins."""
        order = self._shard_order(self._epoch)
        shard, group = self._shard, self._group
        groups: list[tuple[int, int]] = []
        while shard < order.size and len(groups) < WINDOW_GROUPS:
            self._prefetch(order, shard)
            number = int(order[shard])
            inside = self._group_order(number)
            taken = inside[group : group + WINDOW_GROUPS - len(groups)].tolist()
            groups += [(number, chosen) for chosen in taken]
            group += len(taken)
            if group == inside.size:
                shard, group = shard + 1, 0
        self._next = (self._epoch, shard, group) if shard < order.size else (self._epoch + 1, 0, 0)
        rows = []
        for number, chosen in groups:
            lengths = self._reader.lengths(self._dataset, number, chosen)
            used = self._reader.numbers(self._dataset, number, chosen)
            rows += [
                RowReference(self._dataset, number, chosen, row, length)
                for row, length in zip(used.tolist(), lengths[used].tolist(), strict=True)
            ]
        if not self._shuffle:
            return rows
        place = self._epoch << 40 | self._shard << 16 | self._group
        shuffled = permutation(len(rows), seed=self._seed, purpose=Purpose.ROWS, key=self._dataset, place=place)
        return [rows[row] for row in shuffled.tolist()]

    def _shard_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return self._shards
        size = self._shards.size
        return self._shards[permutation(size, seed=self._seed, purpose=Purpose.SHARDS, key=self._dataset, place=epoch)]

    def _group_order(self, shard: int) -> np.ndarray:
        size = self._reader.groups(self._dataset, shard)
        if not self._shuffle:
            return np.arange(size)
        place = self._epoch << 40 | shard
        return permutation(size, seed=self._seed, purpose=Purpose.GROUPS, key=self._dataset, place=place)

    def _prefetch(self, order: np.ndarray, shard: int) -> None:
        """Prefetch the shard at place `shard` of this epoch's order and those after it, also of the next epoch."""
        records = self._reader.datasets[self._dataset].shards
        wanted, bytes_ahead = [int(order[shard])], 0
        for number in map(int, chain(order[shard + 1 :], self._shard_order(self._epoch + 1))):
            if bytes_ahead >= _PREFETCH_BYTES:
                break
            wanted.append(number)
            bytes_ahead += records[number].file.bytes
        self._reader.prefetch(self._dataset, dict.fromkeys(wanted))


class MixtureCursor(TypedDict):
    """`taken`: rows so far; `feeds`: the cursor of each dataset's `ShuffledRows`. Stored in checkpoints."""

    taken: int
    feeds: list[list[int]]


class Mixture:
    """Rows of several datasets; a uniform number of (seed, n) chooses the dataset of row n by its weight.

    With `in_turn`, the rows of each dataset, they come one dataset after the other, each row once in an epoch.
    """

    def __init__(
        self,
        datasets: Sequence[ShuffledRows],
        *,
        weights: Sequence[float],
        seed: int,
        in_turn: Sequence[int] | None = None,
    ):
        self._datasets, self._seed = datasets, seed
        self._edges = np.cumsum(weights)[:-1] / sum(weights)
        self._ends = None if in_turn is None else np.cumsum(in_turn)
        self._block, self._choices = -1, np.empty(0, np.int64)
        self.taken = 0

    def seek(self, cursor: MixtureCursor) -> None:
        """Continue from a place that `cursor` returned."""
        self.taken = cursor["taken"]
        for rows, place in zip(self._datasets, cursor["feeds"], strict=True):
            rows.seek(place)

    def cursor(self) -> MixtureCursor:
        """The place behind the last row returned."""
        return {"taken": self.taken, "feeds": [list(rows.cursor()) for rows in self._datasets]}

    def __iter__(self) -> Iterator[RowReference]:
        return self

    def __next__(self) -> RowReference:
        """The next row. Raises what `RowReader.rows` raises."""
        rows = self._datasets[self._choice(self.taken)]
        self.taken += 1
        return next(rows)

    def _choice(self, number: int) -> int:
        if not self._edges.size:
            return 0
        if self._ends is not None:
            return int(np.searchsorted(self._ends, number % self._ends[-1], "right"))
        block, place = divmod(number, MIXTURE_BLOCK)
        if block != self._block:
            uniforms = mixture_uniforms(block, seed=self._seed)
            self._block, self._choices = block, np.searchsorted(self._edges, uniforms, "right")
        return int(self._choices[place])
