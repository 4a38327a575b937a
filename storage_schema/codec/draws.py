"""The tail draws of a row as byte streams, and back (FORMAT.md, "Draws").

Shape letters: `N` target positions of the row, `D` draws, `R` kept draws of all positions.

The draws of a position are a multiset: their ranks are sorted, and each is stored as its distance to the one before; a
repeat is distance 0. This takes fewer bytes than a stream of multiplicities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coldstill.storage_schema.errors import StreamDamaged
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

from .byte_planes import half_planes, to_escapes, to_planes
from .frames import Frames, bounded
from .kept_entries import IdRanks, id_width

_MAX_DRAWS = 1 << 24


class Draws(NamedTuple):
    """`ids int32 [R]`, `counts int32 [N]`, `logprobs float32 [R]` or none."""

    ids: np.ndarray
    counts: np.ndarray
    logprobs: np.ndarray | None


class DrawStreams:
    """Encodes and decodes the draws of one dataset's rows."""

    def __init__(self, header: DatasetHeader, ranks: IdRanks):
        self._ranks = ranks
        self._kept_draws = header.kept_draws
        self._has_logprobs = header.draw_logprobs
        self._token_count = header.token_count
        self._id_width = id_width(header.token_count)
        self._count_width = 1 if header.kept_draws <= 255 else 2

    def encode(self, targets: TeacherTargets) -> dict[str, np.ndarray]:
        """The streams; an empty dictionary if no position has a draw."""
        if not targets.draw_ids.size:
            return {}
        ranks = self._ranks.of(targets.draw_ids).astype(np.int64)
        owner = np.repeat(np.arange(targets.positions), targets.draw_counts)
        order = np.lexsort((ranks, owner))
        ranks = ranks[order]
        starts = (np.cumsum(targets.draw_counts) - targets.draw_counts)[targets.draw_counts > 0]
        deltas = np.diff(ranks, prepend=0)
        deltas[starts] = ranks[starts]
        ids, escapes = to_escapes(deltas, self._id_width)
        streams = {
            "draw_counts": to_planes(targets.draw_counts, self._count_width),
            "draw_ids": ids,
            "draw_id_escapes": escapes,
        }
        if self._has_logprobs:
            assert targets.draw_logprobs is not None
            streams["draw_logprobs"] = half_planes(np.maximum(targets.draw_logprobs[order], LOG_FLOOR))
        return streams

    def decode(self, frames: Frames) -> Draws:
        """The draws of the rows, each position's in ascending order of rank. Raises `StreamDamaged`."""
        counts = frames.counts("draw_counts", width=self._count_width, low=0, high=self._kept_draws, absent=0)
        if counts is None:
            frames.require_empty("draw_ids", "draw_id_escapes", "draw_logprobs")
            none = np.empty(0, np.int32)
            logprobs = none.astype(np.float32) if self._has_logprobs else None
            return Draws(none, np.zeros(sum(frames.positions), np.int32), logprobs)
        sizes = frames.totals(counts)
        if sum(sizes) > _MAX_DRAWS:
            raise StreamDamaged("stream draw_counts", found=f"{sum(sizes)} draws", wanted=f"at most {_MAX_DRAWS}")
        deltas = frames.escaped("draw_ids", "draw_id_escapes", sizes, width=self._id_width)
        bounded("draw_ids", deltas, low=0, high=self._token_count - 1)
        # The sum over all positions may wrap around; differences within one position are exact if that one's sum fits.
        fits = self._kept_draws * self._token_count < 1 << 31
        sums = np.cumsum(deltas, dtype=np.int32 if fits else np.int64)
        starts = np.cumsum(counts) - counts
        before = (sums - deltas).take(starts, mode="clip")
        ranks = bounded("draw_ids", sums - np.repeat(before, counts), low=0, high=self._token_count - 1)
        if not self._has_logprobs:
            frames.require_empty("draw_logprobs")
        logprobs = frames.halves("draw_logprobs", sizes) if self._has_logprobs else None
        return Draws(self._ranks.ids(ranks).astype(np.int32, copy=False), counts, logprobs)
