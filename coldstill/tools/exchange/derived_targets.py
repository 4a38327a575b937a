"""Derives what other tools do not store: tail mass and label log-prob.

Shape letters: `N` target positions, `W` entries of the other layout at a position, `K` teacher top-k.

No other tool stores the mass outside its kept ids. The tail is therefore `log(max(1 - sum of kept, 1e-6))` in float64
(the header has `tail: derived`). Where kept mass and tail sum to more than 1, both are scaled down to 1.
"""

from __future__ import annotations

import numpy as np

from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets
from coldstill.tools.errors import NotFullSoftmax, UnusableRow

MIN_TAIL = 1e-6
"""Least mass of a derived tail: smaller ones are below the rounding error of float32 log-probs."""

ABSENT_LOGPROB = -9999.0
"""Entries at or below this are padding: -inf, -9999 in vLLM's server, -1e9 in axolotl's collator."""

NO_LOGITS = "centered or raw logits cannot be imported: the file does not hold their normalizer"

MAX_MASS = 1.05
"""Largest mass of kept ids: bfloat16 log-probs of a full softmax sum to less than 1.02."""


def derived_targets(
    ids: np.ndarray,
    logprobs: np.ndarray,
    *,
    present: np.ndarray,
    labels: np.ndarray,
    token_count: int,
    top_k: int,
    max_mass: float = MAX_MASS,
    renormalized: bool = False,
) -> TeacherTargets:
    """Targets from the entries `ids int64 [N, W]` and `logprobs float64 [N, W]` where `present bool [N, W]` is set.

    `labels [N]`: the token that follows in the text. Entries at or below `ABSENT_LOGPROB` are padding and are dropped.
    Ids that the tokenizer does not have, and entries after the most probable `top_k`, are dropped too, and their mass
    belongs to the tail. The label's log-prob is that of its entry. A label without an entry gets an even share of the
    tail, `log_tail - log(token_count - counts)`, and never more than the tail. With `renormalized`, the entries of a
    position sum to 1 but for their rounding, which is removed.

    Raises `UnusableRow` for NaN, +inf, a negative id, an id twice at one position, a position without an id. Raises
    `NotFullSoftmax` for a position with a mass above `max_mass`.
    """
    _check_numbers(ids, logprobs, present)
    kept = present & (logprobs > ABSENT_LOGPROB)
    if renormalized:
        logprobs = _without_rounding(logprobs, kept)
    kept &= ids < token_count
    _check_distinct(ids, kept)
    clamped = np.where(kept, np.maximum(logprobs, LOG_FLOOR), -np.inf)
    if not kept.all() or ids.shape[1] > top_k:  # kept ids may have any order, but must precede the dropped ones
        order = np.argsort(-clamped, axis=1, kind="stable")
        ids, clamped = np.take_along_axis(ids, order, 1), np.take_along_axis(clamped, order, 1)
    with np.errstate(over="ignore"):
        probs = np.exp(clamped)
        heaviest = float(probs.sum(axis=1).max(initial=0.0))
    if heaviest > max_mass:
        largest = float(clamped.max(initial=-np.inf))
        if 0.05 < largest <= 1 and float(np.where(kept, logprobs, np.inf).min()) >= 0:
            raise NotFullSoftmax(
                "the entries of a position",
                found=f"values from 0 to 1, such as {largest:.4g}",
                wanted="log-probs, which are never above 0",
                fix="store the natural logarithm of these probabilities",
            )
        raise NotFullSoftmax(
            "the entries of a position",
            found=f"probabilities that sum to {heaviest:.4g}",
            wanted=f"log-probs of the full softmax: a sum of at most 1, {max_mass} with rounding",
            fix=f"{NO_LOGITS}; multiply log-probs to base 10 by 2.302585",
        )
    is_label = (ids == labels[:, None]) & (probs > 0)
    label_value = np.where(is_label, clamped, -np.inf).max(axis=1, initial=-np.inf)
    counts = np.minimum((probs > 0).sum(axis=1), top_k)
    if counts.size and counts.min() == 0:
        raise UnusableRow(
            f"target {int(counts.argmin())}",
            found="no entry with an id of the tokenizer and a mass above 0",
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


def _without_rounding(logprobs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", divide="ignore"):
        log_total = np.log(np.exp(logprobs).sum(axis=1, where=kept, keepdims=True))
    small = np.abs(log_total) < np.log(MAX_MASS)  # any other sum is an error, which a later check names
    return np.where(kept & small, logprobs - np.where(small, log_total, 0), logprobs)


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
            wanted="distinct ids; a row filled with zeros is not a distribution",
        )
