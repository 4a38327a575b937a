"""The id rank table of a header: token ids to ranks and back. Frequent ids get low ranks, so that deltas are short.

A header lists ids from the most frequent on; those that it does not list follow in ascending order. No list: a rank is
an id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Ranks:
    """The ranks of the ids below `token_count`, with `listed` ids first."""

    def __init__(self, listed: Sequence[int], *, token_count: int):
        self._by_rank: np.ndarray | None = None
        if listed:
            first = np.asarray(listed, np.int32)
            others = np.ones(token_count, bool)
            others[first] = False
            self._by_rank = np.concatenate((first, np.flatnonzero(others).astype(np.int32)))
            self._rank_of = np.empty(token_count, np.int32)
            self._rank_of[self._by_rank] = np.arange(token_count, dtype=np.int32)

    @property
    def are_ids(self) -> bool:
        """Whether every rank is its id."""
        return self._by_rank is None

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Ranks of `ids`, shaped as they are."""
        return ids if self._by_rank is None else self._rank_of[ids]

    def ids(self, ranks: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
        """Ids of `ranks`, all below `token_count`; into `out` where given."""
        if self._by_rank is not None:
            return np.take(self._by_rank, ranks, out=out, mode="clip")
        if out is None:
            return ranks
        out[:] = ranks
        return out
