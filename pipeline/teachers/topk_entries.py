"""Makes `TeacherTargets` from the K best entries and the label's log-prob, with a derived tail.

For engines that give no more than these. Shape letters: `N` target positions, `K` teacher top-k.
"""

from __future__ import annotations

import numpy as np

from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.storage_schema.rows import MASS_TOLERANCE, TeacherTargets

DERIVED_TAIL_FLOOR = 1e-6
"""Smallest derived tail mass: below it, 1 minus the kept mass is rounding noise."""


def targets_of_entries(
    labels: np.ndarray,
    label_logprobs: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
    *,
    min_prob: float,
    token_count: int,
    where: str,
    fix: str,
) -> TeacherTargets:
    """Targets of `ids int [N, K]`, `logprobs float64 [N, K]` in any order, with `labels int [N]` and their
    `label_logprobs float64 [N]`. The tail is derived: `log(max(1 - sum of kept, 1e-6))` in float64; no draws.

    Ids from `token_count` on (padding columns), ids under the floor and ids without mass are dropped; their mass is
    part of the tail. Raises `TeacherOutputInvalid`, with `where` and `fix` in it, for values that are not log-probs of
    a softmax.
    """
    if np.isnan(logprobs).any() or np.isnan(label_logprobs).any():
        raise TeacherOutputInvalid(where, found="a log-prob that is not a number", wanted="natural logs", fix=fix)
    mass = np.exp(np.minimum(logprobs, 1.0)).sum(1)
    if mass.size and mass.max() > 1 + MASS_TOLERANCE:
        raise TeacherOutputInvalid(
            where,
            found=f"K best entries of mass {mass.max():.3g}",
            wanted="log-probs of one softmax: at most 1",
            fix=fix,
        )
    ids, logprobs, counts = _kept(ids, logprobs, min_prob, token_count)
    if not np.isfinite(logprobs[:, 0]).all():
        raise TeacherOutputInvalid(
            where, found="no entry that has mass and is a token", wanted=f"one with an id below {token_count}", fix=fix
        )
    log_tail = np.log(np.maximum(1 - np.exp(logprobs).sum(1), DERIVED_TAIL_FLOOR))
    at_label = (ids == labels[:, None]).any(1)
    return TeacherTargets(
        ids=ids.astype(np.int32),
        logprobs=np.minimum(logprobs, 0).astype(np.float32),
        counts=counts,
        log_tail=log_tail.astype(np.float32),
        label_logprob=np.minimum(label_logprobs, np.where(at_label, 0, log_tail)).astype(np.float32),
        draw_ids=np.empty(0, np.int32),
        draw_counts=np.zeros(labels.size, np.int32),
    )


def _kept(
    ids: np.ndarray, logprobs: np.ndarray, min_prob: float, token_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept ids and log-probs (descending, ties by id), then the first id again with -inf; and how many are kept."""
    logprobs = np.where(ids < token_count, logprobs, -np.inf)
    keep = np.isfinite(logprobs) & (np.exp(logprobs) >= min_prob)
    keep[np.arange(len(ids)), logprobs.argmax(1)] = True
    logprobs = np.where(keep, logprobs, -np.inf)
    order = np.lexsort((ids, -logprobs), axis=1)
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    ids = np.where(np.isfinite(logprobs), ids, ids[:, :1])
    return ids, logprobs, keep.sum(1).astype(np.int32)
