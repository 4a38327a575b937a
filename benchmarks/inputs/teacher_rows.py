"""Rows of a teacher's distributions, stored wide and narrowed to the limits of a capture.

Shape letters: `N` target positions of a row, `K` kept ids, `D` draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coldstill.storage_schema.rows import LOG_FLOOR, CachedRow, TeacherTargets

WIDEST = 128
DRAWS = 64
KEPT_DRAWS = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a capture: at most `top_k` ids with at least `min_prob`, and at most `KEPT_DRAWS` tail draws.

    Tail draws are those of `draws` draws from the full softmax that fall outside the kept ids.
    """

    top_k: int
    min_prob: float = 0.0
    draws: int = 0

    @property
    def kept_draws(self) -> int:
        """The most draws kept at a position."""
        return min(self.draws, KEPT_DRAWS)


@dataclass(frozen=True, kw_only=True)
class WideRow:
    """A row with `WIDEST` kept ids, no floor, and all `draws int32 [N, DRAWS]` from the full softmax."""

    sample_id: str
    token_ids: np.ndarray
    targets: TeacherTargets
    draws: np.ndarray


def narrowed(row: WideRow, limits: Limits) -> CachedRow:
    """The row as a capture with these limits writes it: ids below the floor go to the tail, draws inside are dropped.

    `limits.top_k` is at most `WIDEST`, `limits.draws` at most `DRAWS`.
    """
    wide, top_k = row.targets, limits.top_k
    ids, logprobs = wide.ids[:, :top_k], wide.logprobs[:, :top_k]
    kept = logprobs >= (math.log(limits.min_prob) if limits.min_prob else -np.inf)
    kept[:, 0] = True
    probs = np.exp(wide.logprobs, dtype=np.float64)
    dropped = np.where(kept, 0, probs[:, :top_k]).sum(1) + probs[:, top_k:].sum(1)
    tail = np.exp(wide.log_tail, dtype=np.float64) + dropped
    drawn = row.draws[:, : limits.draws]
    hit = np.ones(drawn.shape, bool)
    for draw in range(limits.draws):
        hit[:, draw] = ~((ids == drawn[:, draw, None]) & kept).any(1)
    hit &= np.cumsum(hit, 1) <= limits.kept_draws
    targets = TeacherTargets(
        ids=np.where(kept, ids, ids[:, :1]),
        logprobs=np.where(kept, logprobs, np.float32(-np.inf)),
        counts=kept.sum(1, dtype=np.int32),
        log_tail=np.clip(np.log(tail), LOG_FLOOR, 0).astype(np.float32),
        label_logprob=wide.label_logprob,
        draw_ids=drawn[hit],
        draw_counts=hit.sum(1, dtype=np.int32),
    )
    spans = np.array([[0, wide.positions]], np.int32)
    return CachedRow(sample_id=row.sample_id, token_ids=row.token_ids, target_spans=spans, targets=targets)


def all_draws(targets: TeacherTargets, uniforms: np.ndarray) -> np.ndarray:
    """`int32 [N, D]`: the draws of `uniforms [N, D]`, including those inside the kept ids.

    The extractor of targets puts the kept ids' mass first on the unit interval, so the smallest uniforms are inside.
    """
    order = np.argsort(np.argsort(uniforms, axis=1), axis=1)
    outside = order >= (uniforms.shape[1] - targets.draw_counts)[:, None]
    cumulative = np.cumsum(np.exp(targets.logprobs, dtype=np.float64), 1)
    place = np.stack([np.searchsorted(sums, row, "right") for sums, row in zip(cumulative, uniforms, strict=True)])
    drawn = np.take_along_axis(targets.ids, np.minimum(place, targets.top_k - 1), 1)
    drawn[outside] = targets.draw_ids
    return drawn
