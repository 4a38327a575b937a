"""Log-probs without a tail in, `TeacherTargets` out: the numbers that an import has to derive.

Shape letters: `N` target positions, `W` entries that the other layout holds at a position, `K` teacher top-k.

No peer stores the mass outside its kept ids. The tail is therefore `log(max(1 - sum of kept, 1e-6))` in float64 (the
header says `tail: derived`); where kept and tail together are above 1, all of them are scaled down to 1.
"""

from __future__ import annotations

import numpy as np

from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

from .errors import NotFullSoftmax, UnusableRow

MIN_TAIL = 1e-6
"""Least mass of a derived tail: below it float32 log-probs say nothing."""

ABSENT_LOGPROB = -9999.0
"""At or below this an entry is padding: -inf, the -9999 of vLLM's server, the -1e9 of axolotl's collator."""

MAX_MASS = 1.05
"""Mass of kept ids above which values are no log-probs: bfloat16 log-probs of a full softmax stay below 1.02."""


def derived_targets(
    ids: np.ndarray,
    logprobs: np.ndarray,
    *,
    present: np.ndarray,
    labels: np.ndarray,
    token_count: int,
    top_k: int,
    max_mass: float = MAX_MASS,
) -> TeacherTargets:
    """Targets from the entries `ids int64 [N, W]`, `logprobs float64 [N, W]`, of which `present bool [N, W]` are meant.

    `labels [N]` is the token that really follows. An entry at or below `ABSENT_LOGPROB` is padding and is left out. An
    id that the tokenizer does not have is dropped, its mass goes to the tail; so are entries beyond the most probable
    `top_k`. The label's log-prob is the stored one where an entry holds it. Elsewhere it is unknown, and becomes
    `log_tail - log(token_count - counts)`: the tail spread evenly over all ids that are not kept, never above the tail.

    Raises `UnusableRow` for NaN, +inf, a negative id, an id twice at one position, a position without an id; raises
    `NotFullSoftmax` for a position whose entries hold more than `max_mass`.
    """
    _check_numbers(ids, logprobs, present)
    kept = present & (logprobs > ABSENT_LOGPROB) & (ids < token_count)
    _check_distinct(ids, kept)
    clamped = np.where(kept, np.maximum(logprobs, LOG_FLOOR), -np.inf)
    if not kept.all() or ids.shape[1] > top_k:  # the kept ids have no order, but they come first
        order = np.argsort(-clamped, axis=1, kind="stable")
        ids, clamped = np.take_along_axis(ids, order, 1), np.take_along_axis(clamped, order, 1)
    with np.errstate(over="ignore"):
        probs = np.exp(clamped)
        heaviest = float(probs.sum(axis=1).max(initial=0.0))
    if heaviest > max_mass:
        raise NotFullSoftmax(
            "the entries of a position",
            found=f"probabilities that sum to {heaviest:.4g}",
            wanted=f"log-probs of the full softmax: a sum of at most 1, {max_mass} with rounding",
            fix="centred or raw logits cannot be imported: their normaliser is not in the file",
        )
    is_label = (ids == labels[:, None]) & (probs > 0)
    label_value = np.where(is_label, clamped, -np.inf).max(axis=1, initial=-np.inf)
    counts = np.minimum((probs > 0).sum(axis=1), top_k)
    if counts.size and counts.min() == 0:
        raise UnusableRow(
            f"target {int(counts.argmin())}",
            found="no entry with a mass and an id of the tokenizer",
            wanted="at least one",
            fix="check that the tokenizer is the teacher's",
        )
    ids, clamped, is_label = ids[:, :top_k], clamped[:, :top_k], is_label[:, :top_k].any(axis=1)
    mass = probs[:, :top_k].sum(axis=1)
    tail = np.maximum(1 - mass, MIN_TAIL)
    log_total = np.log(mass + tail)
    log_tail = np.log(tail) - log_total
    spread = log_tail - np.log(np.maximum(token_count - counts, 1))
    outside = np.where(label_value > -np.inf, np.minimum(label_value - log_total, log_tail), spread)
    used = np.arange(top_k) < counts[:, None]
    return TeacherTargets(
        ids=np.where(used, _padded(ids, top_k), ids[:, :1]).astype(np.int32),
        logprobs=np.where(used, _padded(clamped, top_k) - log_total[:, None], -np.inf).astype(np.float32),
        counts=counts.astype(np.int32),
        log_tail=log_tail.astype(np.float32),
        label_logprob=np.where(is_label, label_value - log_total, outside).astype(np.float32),
        draw_ids=np.empty(0, np.int32),
        draw_counts=np.zeros(counts.size, np.int32),
    )


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def _check_numbers(ids: np.ndarray, logprobs: np.ndarray, present: np.ndarray) -> None:
    broken = present & (np.isnan(logprobs) | np.isposinf(logprobs))
    if broken.any():
        raise UnusableRow(f"target {int(broken.any(axis=1).argmax())}", found="NaN or +inf", wanted="finite log-probs")
    negative = present & (ids < 0) & (logprobs > ABSENT_LOGPROB)
    if negative.any():
        raise UnusableRow(f"target {int(negative.any(axis=1).argmax())}", found="a negative id", wanted="ids >= 0")


def _check_distinct(ids: np.ndarray, kept: np.ndarray) -> None:
    ordered = np.sort(np.where(kept, ids, -1 - np.arange(ids.shape[1])), axis=1)
    twice = np.diff(ordered, axis=1) == 0
    if twice.any():
        raise UnusableRow(
            f"target {int(twice.any(axis=1).argmax())}",
            found="an id twice",
            wanted="distinct ids: rows filled with zeros are no distributions",
        )
