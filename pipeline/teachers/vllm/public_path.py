"""Reads what vLLM returns for one prompt. Plain lists in, `TeacherTargets` out; imports nothing of vLLM.

Shape letters: `T` tokens, `N` target positions, `K` teacher top-k.

vLLM's flat prompt log-probs hold one run of entries for each prompt token: none for the first, and for token `j` the
log-prob of token `j` itself followed by the K best of the distribution that predicts it. So the run of token `j` is
target position `j - 1` (the alignment law of storage_schema/rows.py).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pipeline.errors import TeacherOutputInvalid
from pipeline.sequences import TokenSequence
from storage_schema.rows import TeacherTargets, span_positions

DERIVED_TAIL_FLOOR = 1e-6
"""The public path gives no tail: 1 minus the kept mass is noise below this."""


class FlatLogprobs(Protocol):
    """The part of vLLM's `FlatLogprobs` that is read here."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


def read_prompt_logprobs(
    flat: FlatLogprobs, sequence: TokenSequence, *, top_k: int, min_prob: float, token_count: int
) -> TeacherTargets:
    """Targets of one sequence. The tail is derived: `log(max(1 - sum of kept, 1e-6))` in float64; no draws.

    Ids from `token_count` on (padding rows of the head) are dropped, and so are ids under the floor; their mass goes to
    the tail. Raises `TeacherOutputInvalid` where vLLM gave other than K + 1 entries for a wanted position.
    """
    positions = span_positions(sequence.target_spans)
    labels = sequence.token_ids[positions + 1]
    if len(flat.start_indices) != sequence.token_ids.size:
        raise _invalid(
            sequence, f"{len(flat.start_indices)} runs of entries", f"one for each of {sequence.token_ids.size}"
        )
    starts = np.asarray(flat.start_indices, np.int64)[positions + 1]
    found = np.asarray(flat.end_indices, np.int64)[positions + 1] - starts
    if (found != top_k + 1).any():
        worst = int((found != top_k + 1).argmax())
        raise _invalid(sequence, f"{found[worst]} entries at position {positions[worst]}", f"{top_k + 1}")
    entries = starts[:, None] + np.arange(top_k + 1)
    all_ids = np.asarray(flat.token_ids, np.int32)[entries]
    all_logprobs = np.asarray(flat.logprobs, np.float64)[entries]
    if (all_ids[:, 0] != labels).any():
        raise _invalid(sequence, "log-probs of other tokens than were asked for", "those of the prompt's own tokens")
    if np.isnan(all_logprobs).any():
        raise _invalid(sequence, "a log-prob that is not a number", "natural logs")
    ids, logprobs, counts = _kept(all_ids[:, 1:], all_logprobs[:, 1:], min_prob, token_count)
    mass = np.exp(logprobs).sum(1)
    log_tail = np.log(np.maximum(1 - mass, DERIVED_TAIL_FLOOR))
    at_label = ids == labels[:, None]
    label_logprob = np.where(at_label.any(1), all_logprobs[:, 0], np.minimum(all_logprobs[:, 0], log_tail))
    return TeacherTargets(
        ids=ids,
        logprobs=logprobs.astype(np.float32),
        counts=counts,
        log_tail=log_tail.astype(np.float32),
        label_logprob=label_logprob.astype(np.float32),
        draw_ids=np.empty(0, np.int32),
        draw_counts=np.zeros(positions.size, np.int32),
    )


def _kept(
    ids: np.ndarray, logprobs: np.ndarray, min_prob: float, token_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kept ids and log-probs first (descending, ties by id), then the first id again with -inf; and their counts."""
    keep = (ids < token_count) & (np.exp(logprobs) >= min_prob)
    best = np.where(ids < token_count, logprobs, -np.inf).argmax(1)
    keep[np.arange(len(ids)), best] = True
    logprobs = np.where(keep, logprobs, -np.inf)
    order = np.lexsort((ids, -logprobs), axis=1)
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    ids = np.where(np.isfinite(logprobs), ids, ids[:, :1])
    return ids, logprobs, keep.sum(1).astype(np.int32)


def _invalid(sequence: TokenSequence, found: str, wanted: str) -> TeacherOutputInvalid:
    return TeacherOutputInvalid(
        f"vLLM's prompt log-probs of row {sequence.sample_id!r}",
        found=found,
        wanted=wanted,
        fix="this vLLM release may return them in another way: use the pinned one, or teacher.engine: transformers",
    )
