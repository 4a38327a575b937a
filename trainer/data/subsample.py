"""Reduces stored targets at training time: a smaller top-k, fewer tail draws.

Shape letters: `N` target positions, `K` stored top-k, `R` stored draws of all positions.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from coldstill.storage_schema.rows import CachedRow, TeacherTargets

from .rng import words_of_positions


class WeightedDraws(NamedTuple):
    """`targets`, and `weights float32 [R]`: the share of its position's tail that each draw represents."""

    targets: TeacherTargets
    weights: np.ndarray


def with_fewer_draws(row: CachedRow, *, taken: int, wanted: int, seed: int) -> CachedRow:
    """The row as if `wanted` draws had been taken at each position instead of `taken`: a uniform subset.

    Stored draws are sorted by id, so a prefix of them would favor frequent ids. The subset is a function of (`seed`,
    sample id, position): each of the `taken` draws gets a random word, the stored draws the first words, and the draws
    with the `wanted` smallest words stay.
    """
    targets = row.targets
    if not targets.draw_ids.size:
        return row
    key = int.from_bytes(hashlib.sha256(row.sample_id.encode()).digest()[:8], "little")
    words = words_of_positions(row.positions, taken, seed=seed, key=key)
    chosen = _smallest(words, wanted)
    is_stored = np.arange(taken) < targets.draw_counts[:, None]
    stays = chosen[is_stored]
    reduced = replace(
        targets,
        draw_ids=targets.draw_ids[stays],
        draw_counts=(chosen & is_stored).sum(1, dtype=np.int32),
        draw_logprobs=None if targets.draw_logprobs is None else targets.draw_logprobs[stays],
    )
    return replace(row, targets=reduced)


def with_smaller_top_k(targets: TeacherTargets, top_k: int) -> WeightedDraws:
    """Keep the `top_k` most probable ids of each position; the others join the tail as draws of known weight.

    With `m` the stored tail mass, the new tail mass is m' = m + the sum of the cut probabilities p. Cut ids are known
    exactly: each has the share p / m' of the tail, and the stored draws together have the share m / m'. The weights of
    a position without stored draws sum to less than 1. Of equal log-probs the one in the lower column stays.
    """
    stays = _most_probable(targets.logprobs, top_k)
    is_cut = ~stays & (targets.logprobs > -np.inf)
    probs = np.exp(targets.logprobs, dtype=np.float64)
    old_tail = np.exp(targets.log_tail, dtype=np.float64)
    new_tail = old_tail + np.where(is_cut, probs, 0).sum(1)

    cut_counts, draw_counts = is_cut.sum(1), targets.draw_counts.astype(np.int64)
    counts = cut_counts + draw_counts
    starts = np.cumsum(counts) - counts
    at_draws, at_cut = _places(starts, draw_counts), _places(starts + draw_counts, cut_counts)

    def mixed(of_draws: np.ndarray, of_cut: np.ndarray, kind: type) -> np.ndarray:
        values: np.ndarray = np.empty(at_draws.size + at_cut.size, kind)
        values[at_draws], values[at_cut] = of_draws, of_cut
        return values

    kept_shape = (targets.positions, top_k)
    reduced = replace(
        targets,
        ids=targets.ids[stays].reshape(kept_shape),
        logprobs=targets.logprobs[stays].reshape(kept_shape),
        counts=np.minimum(targets.counts, top_k),
        log_tail=np.log(new_tail).astype(np.float32),
        draw_ids=mixed(targets.draw_ids, targets.ids[is_cut], np.int32),
        draw_counts=counts.astype(np.int32),
        draw_logprobs=None
        if targets.draw_logprobs is None
        else mixed(targets.draw_logprobs, targets.logprobs[is_cut], np.float32),
    )
    of_draws = np.repeat(old_tail / new_tail / np.maximum(draw_counts, 1), draw_counts)
    of_cut = (probs / new_tail[:, None])[is_cut]
    return WeightedDraws(reduced, mixed(of_draws, of_cut, np.float32))


def _most_probable(logprobs: np.ndarray, count: int) -> np.ndarray:
    """`bool [N, K]`: the `count` largest of each position; of equal ones the first."""
    # Without the sign bit, the bits of a float32 <= 0 grow as the number falls. The column makes each key unique.
    keys = (logprobs.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.uint64) << np.uint64(16)
    return _smallest(keys | np.arange(logprobs.shape[1], dtype=np.uint64), count)


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """`bool [N, n]`: the `count` smallest of each row of `keys [N, n]`. The keys of a row must be distinct."""
    if count == 0:
        return np.zeros(keys.shape, bool)
    if count >= keys.shape[1]:
        return np.ones(keys.shape, bool)
    return keys <= np.partition(keys, count - 1, axis=1)[:, count - 1, None]


def _places(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`int64`: the flat indices of runs of `counts [N]` values that begin at `starts [N]`."""
    return np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
