"""The kept ids of a row with their log-probs and tails, in the two ways that a header can name.

Shape letters: `N` target positions of the row, `K` teacher top-k, `S` kept entries of all positions.

`GridKept`: ids as sorted sets (deltas between ranks), log-probs as levels of a grid below the position's last one.
`Float16Kept`: ids and halves in the order in which the teacher gave them.
Entries travel flat, position by position: `[S]`.
"""

from __future__ import annotations

import numpy as np

from storage_schema.errors import StreamDamaged
from storage_schema.header import DatasetHeader
from storage_schema.rows import LOG_FLOOR, TeacherTargets

from .frames import Frames
from .grid import Grid
from .octets import ESCAPE, from_planes, half_planes, halves, to_escapes, to_planes
from .ranks import Ranks


def id_width(token_count: int) -> int:
    """Bytes of an id where it does not fit into one: 2 up to 65,536 ids, else 3."""
    return 2 if token_count <= 1 << 16 else 3


class GridKept:
    """Codec `grid` (FORMAT.md, "Kept entries")."""

    def __init__(self, header: DatasetHeader, ranks: Ranks):
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
        # Unused entries sort behind all others: rank and level side by side in one integer.
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
        """Fill `ids int32 [N, K]`, `logprobs float32 [N, K]`, `log_tail float32 [N]`, before they are normalised.

        `counts int32 [N]`: none where all are K. Raises `StreamDamaged`.
        """
        positions, width = ids.shape
        total = ids.size if counts is None else int(counts.sum(dtype=np.int64))
        last = frames.bounded(
            "last_levels", from_planes(frames.open("last_levels", 2 * positions), 2), low=0, high=self.grid.top
        )
        tail_levels = frames.bounded(
            "log_tail", from_planes(frames.open("log_tail", 2 * positions), 2), low=0, high=self.grid.top
        )
        gaps = self._escaped(frames, "logprobs", "logprob_escapes", total, 2)
        deltas = self._escaped(frames, "ids", "id_escapes", total, self._id_width)
        if counts is None:
            levels = np.subtract(last[:, None], gaps.reshape(positions, width))
            ranks = _running_sums(deltas.reshape(positions, width), self._token_count)
            highest = ranks[:, -1]
        else:
            levels = np.repeat(last, counts) - gaps
            ranks = _ragged_sums(deltas, counts)
            highest = ranks
        if levels.size and levels.min() < 0:
            raise StreamDamaged("stream logprobs", found="an entry above probability 1", wanted="levels from 0 on")
        if highest.size and highest.max() >= self._token_count:
            raise StreamDamaged("stream ids", found=int(highest.max()), wanted=f"ranks below {self._token_count}")
        log_tail[:] = self.grid.logprobs[tail_levels]
        if counts is None:
            self._ranks.ids(ranks, out=ids)
            np.take(self.grid.logprobs, levels, out=logprobs, mode="clip")
        elif total:
            _scatter(self._ranks.ids(ranks), self.grid.logprobs[levels], counts, ids=ids, logprobs=logprobs)

    def _escaped(self, frames: Frames, name: str, escapes: str, size: int, width: int) -> np.ndarray:
        """`int32 [size]` from one byte each and the list of what is above."""
        short = frames.open(name, size)
        values = short.astype(np.int32)
        escaped = np.flatnonzero(short == ESCAPE)
        values[escaped] += from_planes(frames.open(escapes, width * escaped.size), width)
        return values


class Float16Kept:
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
        """As `GridKept.decode`."""
        positions, width = ids.shape
        total = ids.size if counts is None else int(counts.sum(dtype=np.int64))
        kept_ids = frames.bounded(
            "ids",
            from_planes(frames.open("ids", self._id_width * total), self._id_width),
            low=0,
            high=self._token_count - 1,
        )
        values = open_halves(frames, "logprobs", total)
        log_tail[:] = open_halves(frames, "log_tail", positions)
        for unused in ("id_escapes", "logprob_escapes", "last_levels"):
            frames.open(unused, 0)
        if counts is None:
            ids[:] = kept_ids.reshape(positions, width)
            logprobs[:] = values.reshape(positions, width)
        else:
            _scatter(kept_ids, values, counts, ids=ids, logprobs=logprobs)
        in_order = np.sort(np.where(np.isneginf(logprobs), -1 - np.arange(width), ids), axis=1)
        if width > 1 and (np.diff(in_order, axis=1) == 0).any():
            raise StreamDamaged("stream ids", found="an id kept twice at one position", wanted="distinct ids")


def open_halves(frames: Frames, name: str, count: int) -> np.ndarray:
    """`float32 [count]`: log-probs of a stream of halves. Raises `StreamDamaged` unless they are finite and <= 0."""
    values = halves(frames.open(name, 2 * count))
    if values.size and not (np.isfinite(values).all() and values.max() <= 0):
        raise StreamDamaged(f"stream {name}", found="a value that is not finite or above 0", wanted="natural logs <= 0")
    return values


def _running_sums(deltas: np.ndarray, token_count: int) -> np.ndarray:
    """`[N, K]` ranks: the running sum of delta + 1, less 1, of each position."""
    width = deltas.shape[1]
    if deltas.size and deltas.max() >= token_count:
        raise StreamDamaged("stream ids", found=int(deltas.max()), wanted=f"ranks below {token_count}")
    ranks = np.cumsum(deltas, axis=1, dtype=np.int32 if width * token_count < 1 << 31 else np.int64)
    return np.add(ranks, np.arange(width, dtype=ranks.dtype), out=ranks)


def _ragged_sums(deltas: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`int64 [S]` ranks: as `_running_sums`, for positions that keep `counts` entries."""
    sums = np.cumsum(deltas, dtype=np.int64) + np.arange(1, deltas.size + 1)
    ends = np.cumsum(counts)
    before = np.concatenate(([0], sums))[ends - counts]
    return sums - np.repeat(before, counts) - 1


def _scatter(
    kept_ids: np.ndarray, kept_logprobs: np.ndarray, counts: np.ndarray, *, ids: np.ndarray, logprobs: np.ndarray
) -> None:
    """Flat entries to `[N, K]`; what a position does not use repeats its first id, with log-prob -inf."""
    kept = np.arange(ids.shape[1]) < counts[:, None]
    ids[:] = kept_ids[np.cumsum(counts) - counts, None]
    ids[kept] = kept_ids
    logprobs.fill(-np.inf)
    logprobs[kept] = kept_logprobs
