"""The kept ids of a row with their log-probs and tails, in the two ways that a header can name.

Shape letters: `N` target positions of the row, `K` teacher top-k, `S` kept entries of all positions.

`GridKept`: ids as sorted sets (deltas between ranks), log-probs as levels of a grid below the position's last one.
`Float16Kept`: ids and halves in the order in which the teacher gave them.
Entries are stored flat, position by position: `[S]`; decoded, they lie where they belong in `[N, K]`. Rows of equal
length, used or not, are summed, looked up and checked several times faster than runs of different lengths.
"""

from __future__ import annotations

import numpy as np

from coldstill.storage_schema.errors import StreamDamaged
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

from .frames import Frames
from .grid import Grid
from .octets import half_planes, to_escapes, to_planes
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
        sizes = entry_sizes(frames, counts, ids.shape[1])
        used = None if counts is None else _used(counts, ids.shape[1])
        top = self.grid.top
        last = frames.integers("last_levels", frames.positions, width=2, low=0, high=top)
        tail_levels = frames.integers("log_tail", frames.positions, width=2, low=0, high=top)
        gaps = frames.escaped("logprobs", "logprob_escapes", sizes, width=2, used=used).reshape(ids.shape)
        levels = np.subtract(last[:, None], gaps, out=gaps)
        if levels.size and levels.min() < 0:
            raise StreamDamaged("stream logprobs", found="an entry above probability 1", wanted="levels from 0 on")
        # Where rows are decoded together the levels lie in the memory of `logprobs`:
        # numpy looks up by a copy of them, as they are narrower than its own indices.
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
        """`[N, K]` ranks: the running sum of delta + 1, less 1, of each position; in `out` where ranks are ids."""
        width = deltas.shape[1]
        if deltas.size and deltas.max() >= self._token_count:
            raise StreamDamaged("stream ids", found=int(deltas.max()), wanted=f"ranks below {self._token_count}")
        fits = width * self._token_count < 1 << 31
        ranks = out if fits and self._ranks.are_ids else np.empty(deltas.shape, np.int32 if fits else np.int64)
        deltas += 1
        deltas[:, 0] -= 1
        return np.cumsum(deltas, axis=1, dtype=ranks.dtype, out=ranks)


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
    """Kept entries of each row, all K of a position where there are no counts."""
    return [width * positions for positions in frames.positions] if counts is None else frames.totals(counts)


def _used(counts: np.ndarray, width: int) -> np.ndarray:
    """`bool [N, K]`: the first `counts [N]` of each position."""
    return np.less(np.arange(width, dtype=np.int32), counts[:, None])


def _blank(unused: np.ndarray, *, ids: np.ndarray, logprobs: np.ndarray) -> None:
    """What a position does not use repeats its first id (or rank), with log-prob -inf."""
    np.copyto(ids, ids[:, :1], where=unused)
    np.copyto(logprobs, -np.inf, where=unused)
