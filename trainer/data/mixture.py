"""Rows of several datasets by weight: feeds in, one sequence of row references out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np

from .order import MIXED_AT_ONCE, uniforms_at
from .row_feed import RowFeed
from .row_reader import RowReference


class MixtureCursor(TypedDict):
    """`taken`: rows so far; `feeds`: where each dataset's feed stands."""

    taken: int
    feeds: list[list[int]]


class Mixture:
    """Row number n comes from the dataset that a uniform number of (seed, n) points at; `weights` are their shares."""

    def __init__(self, feeds: Sequence[RowFeed], *, weights: Sequence[float], seed: int):
        self._feeds, self._seed = feeds, seed
        self._edges = np.cumsum(weights)[:-1] / sum(weights)
        self._block, self._choices = -1, np.empty(0, np.int64)
        self.taken = 0

    def seek(self, cursor: MixtureCursor) -> None:
        """Go to a place that `cursor` gave."""
        self.taken = cursor["taken"]
        for feed, place in zip(self._feeds, cursor["feeds"], strict=True):
            feed.seek(place)

    def cursor(self) -> MixtureCursor:
        """Where the sequence stands."""
        return {"taken": self.taken, "feeds": [list(feed.cursor()) for feed in self._feeds]}

    def __iter__(self) -> Iterator[RowReference]:
        return self

    def __next__(self) -> RowReference:
        """The next row. Raises as `RowReader.rows`."""
        feed = self._feeds[self._choice(self.taken)]
        self.taken += 1
        return next(feed)

    def _choice(self, number: int) -> int:
        if not self._edges.size:
            return 0
        block, place = divmod(number, MIXED_AT_ONCE)
        if block != self._block:
            self._block, self._choices = (
                block,
                np.searchsorted(self._edges, uniforms_at(block, seed=self._seed), "right"),
            )
        return int(self._choices[place])
