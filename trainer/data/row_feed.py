"""All rows of one dataset, for ever, as references with lengths. The order of an epoch is a function of (seed, epoch).

Shards are shuffled, then the row groups of each; four row groups in a row, of one shard or of several small ones, are a
window, and the rows of a window are shuffled together: a few row groups are in memory, never a whole shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from .order import Purpose, permutation
from .row_reader import RowReader, RowReference

WINDOW_GROUPS = 4
"""At most 32 MiB and 4,096 rows: neighbours in the source, which may be alike, come apart."""

_AHEAD_BYTES = 64 << 20
"""Behind the shard that is read, so many bytes are made ready: the next shard, or some small ones."""


class RowFeed:
    """Rows of dataset number `dataset` of `reader`, from the first of epoch 0 on or from where `seek` leads."""

    def __init__(self, reader: RowReader, dataset: int, *, seed: int, shuffle: bool):
        self._reader, self._dataset, self._seed, self._shuffle = reader, dataset, seed, shuffle
        # A unit whose rows were all rejected has an empty shard.
        self._shards = np.array([n for n, shard in enumerate(reader.datasets[dataset].shards) if shard.rows], np.int64)
        self.seek((0, 0, 0, 0))

    def seek(self, cursor: Sequence[int]) -> None:
        """Go to a place that `cursor` gave."""
        self._epoch, self._shard, self._group, self._row = cursor
        self._next = (self._epoch, self._shard, self._group)
        self._window: list[RowReference] | None = None

    def cursor(self) -> tuple[int, int, int, int]:
        """Epoch; places in its order of the shard and of the row group at which the window begins; rows of the window
        that were given."""
        return self._epoch, self._shard, self._group, self._row

    def __iter__(self) -> Iterator[RowReference]:
        return self

    def __next__(self) -> RowReference:
        """The next row. Raises as `RowReader.rows`."""
        if self._window is None:
            self._window = self._read_window()
        if self._row == len(self._window):
            self._epoch, self._shard, self._group = self._next
            self._row, self._window = 0, self._read_window()
        self._row += 1
        return self._window[self._row - 1]

    def _read_window(self) -> list[RowReference]:
        """The rows of the window that begins here; where the next one begins is noted."""
        order = self._shard_order(self._epoch)
        shard, group = self._shard, self._group
        groups: list[tuple[int, int]] = []
        while shard < order.size and len(groups) < WINDOW_GROUPS:
            self._expect(order, shard)
            number = int(order[shard])
            inside = self._group_order(number)
            taken = inside[group : group + WINDOW_GROUPS - len(groups)].tolist()
            groups += [(number, chosen) for chosen in taken]
            group += len(taken)
            if group == inside.size:
                shard, group = shard + 1, 0
        self._next = (self._epoch, shard, group) if shard < order.size else (self._epoch + 1, 0, 0)
        rows = [
            RowReference(self._dataset, number, chosen, row, length)
            for number, chosen in groups
            for row, length in enumerate(self._reader.lengths(self._dataset, number, chosen).tolist())
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

    def _expect(self, order: np.ndarray, shard: int) -> None:
        """The shard at place `shard` of this epoch's order and those behind it, into the next epoch."""
        records = self._reader.datasets[self._dataset].shards
        expected, ahead = [int(order[shard])], 0
        for number in map(int, chain(order[shard + 1 :], self._shard_order(self._epoch + 1))):
            if ahead >= _AHEAD_BYTES:
                break
            expected.append(number)
            ahead += records[number].file.bytes
        self._reader.expect(self._dataset, dict.fromkeys(expected))
