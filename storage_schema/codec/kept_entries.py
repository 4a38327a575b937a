"""Encodes the kept entries of a row as byte streams, and decodes them.

Shape letters: `N` target positions of the row, `K` teacher top-k, `S` kept entries of all positions.

`GridEntries`: sorted ranks as deltas, log-probs as grid levels relative to the position's highest level.
`Float16Entries`: ids, and log-probs as float16, in the teacher's order.
Entries are stored flat, position by position: `[S]`. Decoding places them in `[N, K]`: positions of equal length are
summed, looked up and checked several times faster than runs of different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coldstill.storage_schema.errors import StreamDamaged
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

from .byte_planes import half_planes, to_escapes, to_planes
from .frames import Frames
from .grid import Grid


def id_width(token_count: int) -> int:
    """Bytes of an id in planes: 2 up to 65,536 ids, else 3."""
    return 2 if token_count <= 1 << 16 else 3


class IdRanks:
    """Converts token ids to ranks and back, by the rank table of a header (`id_ranks`).

    Frequent ids have low ranks, so that deltas are short. `listed` ids come first, by descending frequency; all others
    follow in ascending order. With an empty list a rank is an id.
    """

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
        """Whether every rank equals its id."""
        return self._by_rank is None

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Ranks of `ids`, in their shape."""
        return ids if self._by_rank is None else self._rank_of[ids]

    def ids(self, ranks: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
        """Ids of `ranks`, all below `token_count`; written to `out` if given."""
        if self._by_rank is not None:
            return np.take(self._by_rank, ranks, out=out, mode="clip")
        if out is None:
            return ranks
        out[:] = ranks
        return out


class GridEntries:
    """Codec `grid` (FORMAT.md, "Kept entries")."""

    def __init__(self, header: DatasetHeader, ranks: IdRanks):
        assert header.codec.a is not None
        assert header.codec.b is not None
        self.grid = Grid(header.codec.a, header.codec.b)
        self._ranks = ranks
        self._token_count = header.token_count
        self._id_width = id_width(header.token_count)

    def encode(self, targets: TeacherTargets) -> dict[str, np.ndarray]:
        """Streams of the kept entries and the tails."""
        kept = targets.kept
        levels = self.grid.levels(targets.logprobs)
        # Rank and level share one integer, so that one sort orders both; unused entries sort last.
        keys = self._ranks.of(targets.ids).astype(np.int64) << 16 | levels
        keys[~kept] = np.iinfo(np.int64).max
        keys.sort(axis=1)
        ranks = keys >> 16
        deltas = np.diff(ranks, axis=1, prepend=-1) - 1
        last = np.where(kept, keys & 0xFFFF, 0).max(axis=1)
        gaps = last[:, None] - (keys & 0xFFFF)
        ids, id_escapes = to_escapes(deltas[kept], self._id_width)
        below, below_escapes = to_escapes(gaps[kept], 2)
        return {
            "ids": ids,
            "id_escapes": id_escapes,
            "logprobs": below,
            "logprob_escapes": below_escapes,
            "last_levels": to_planes(last, 2),
            "log_tail": to_planes(self.grid.levels(targets.log_tail), 2),
        }

    def decode(
        self, frames: Frames, counts: np.ndarray | None, *, ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray
    ) -> None:
        """Fills `ids int32 [N, K]`, `logprobs float32 [N, K]` and `log_tail float32 [N]`, not normalized yet.

        `counts int32 [N]`: None if all are K. Raises `StreamDamaged`.
        """
        sizes = entry_sizes(frames, counts, ids.shape[1])
        used = None if counts is None else _used(counts, ids.shape[1])
        top = self.grid.top
        last = frames.integers("last_levels", frames.positions, width=2, low=0, high=top)
        tail_levels = frames.integers("log_tail", frames.positions, width=2, low=0, high=top)
        gaps = frames.escaped("logprobs", "logprob_escapes", sizes, width=2, used=used).reshape(ids.shape)
        levels = np.subtract(last[:, None], gaps, out=gaps)
        if levels.size and levels.min() < 0:
            raise StreamDamaged("stream logprobs", found="an entry above probability 1", wanted="levels from 0 on")
        # Where rows are decoded together, `levels` and `logprobs` may share memory. That is safe: `levels` is narrower
        # than numpy's index type, so `take` reads a copy of it.
        np.take(self.grid.logprobs, levels, out=logprobs, mode="clip")
        deltas = frames.escaped("ids", "id_escapes", sizes, width=self._id_width, used=used)
        ranks = self._running_sums(deltas.reshape(ids.shape), out=ids)
        if used is not None:
            _blank(~used, ids=ranks, logprobs=logprobs)
        highest = ranks[:, -1] if used is None else ranks
        if highest.size and highest.max() >= self._token_count:
            raise StreamDamaged("stream ids", found=int(highest.max()), wanted=f"ranks below {self._token_count}")
        if ranks is not ids:
            self._ranks.ids(ranks, out=ids)
        log_tail[:] = self.grid.logprobs[tail_levels]

    def _running_sums(self, deltas: np.ndarray, *, out: np.ndarray) -> np.ndarray:
        """`[N, K]` ranks: running sum of (delta + 1), minus 1, along each position; in `out` if ranks are ids."""
        width = deltas.shape[1]
        if deltas.size and deltas.max() >= self._token_count:
            raise StreamDamaged("stream ids", found=int(deltas.max()), wanted=f"ranks below {self._token_count}")
        fits = width * self._token_count < 1 << 31
        ranks = out if fits and self._ranks.are_ids else np.empty(deltas.shape, np.int32 if fits else np.int64)
        deltas += 1
        deltas[:, 0] -= 1
        return np.cumsum(deltas, axis=1, dtype=ranks.dtype, out=ranks)


class Float16Entries:
    """Codec `float16` (FORMAT.md, "Kept entries")."""

    def __init__(self, header: DatasetHeader):
        self._token_count = header.token_count
        self._id_width = id_width(header.token_count)

    def encode(self, targets: TeacherTargets) -> dict[str, np.ndarray]:
        """Streams of the kept entries and the tails."""
        kept = targets.kept
        return {
            "ids": to_planes(targets.ids[kept], self._id_width),
            "logprobs": half_planes(np.maximum(targets.logprobs[kept], LOG_FLOOR)),
            "log_tail": half_planes(np.maximum(targets.log_tail, LOG_FLOOR)),
        }

    def decode(
        self, frames: Frames, counts: np.ndarray | None, *, ids: np.ndarray, logprobs: np.ndarray, log_tail: np.ndarray
    ) -> None:
        """As `GridEntries.decode`."""
        positions, width = ids.shape
        sizes = entry_sizes(frames, counts, width)
        kept_ids = frames.integers("ids", sizes, width=self._id_width, low=0, high=self._token_count - 1)
        values = frames.halves("logprobs", sizes)
        log_tail[:] = frames.halves("log_tail", frames.positions)
        frames.require_empty("id_escapes", "logprob_escapes", "last_levels")
        if counts is None:
            ids[:] = kept_ids.reshape(positions, width)
            logprobs[:] = values.reshape(positions, width)
        else:
            used = _used(counts, width)
            ids[used], logprobs[used] = kept_ids, values
            _blank(~used, ids=ids, logprobs=logprobs)
        in_order = np.sort(np.where(np.isneginf(logprobs), -1 - np.arange(width), ids), axis=1)
        if width > 1 and (np.diff(in_order, axis=1) == 0).any():
            raise StreamDamaged("stream ids", found="an id kept twice at one position", wanted="distinct ids")


def entry_sizes(frames: Frames, counts: np.ndarray | None, width: int) -> list[int]:
    """Kept entries of each row; K per position where `counts` is None."""
    return [width * positions for positions in frames.positions] if counts is None else frames.totals(counts)


def _used(counts: np.ndarray, width: int) -> np.ndarray:
    """`bool [N, K]`: true for the first `counts [N]` entries of each position."""
    return np.less(np.arange(width, dtype=np.int32), counts[:, None])


def _blank(unused: np.ndarray, *, ids: np.ndarray, logprobs: np.ndarray) -> None:
    """Sets the unused entries of each position to its first id (or rank) and log-prob -inf."""
    np.copyto(ids, ids[:, :1], where=unused)
    np.copyto(logprobs, -np.inf, where=unused)
