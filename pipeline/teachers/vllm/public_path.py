"""Makes `TeacherTargets` from vLLM's public prompt log-probs. Imports nothing of vLLM.

Shape letters: `N` target positions, `K` teacher top-k.

vLLM's flat prompt log-probs hold one run of entries for each prompt token. The first token's run is empty. The run of
token `j` holds the log-prob of token `j` itself, then the K best of the distribution that predicts it: it is target
position `j - 1` (the alignment law of storage_schema/rows.py).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.image_expansion import Expansion, as_stored
from coldstill.pipeline.teachers.protocol import ScoredSequence, ScoreResult, TokenSequence, non_finite
from coldstill.pipeline.teachers.topk_entries import targets_of_entries
from coldstill.storage_schema.rows import span_positions

_FIX = "this vLLM release may return another layout: install the pinned one, or set teacher.engine: transformers"


class FlatLogprobs(Protocol):
    """The fields of vLLM's `FlatLogprobs` that are read here."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


def read_prompt_logprobs(
    flat: FlatLogprobs,
    sequence: TokenSequence,
    *,
    top_k: int,
    min_prob: float,
    token_count: int,
    expansion: Expansion | None = None,
) -> ScoreResult:
    """The sequence with targets as `topk_entries.targets_of_entries` makes them: derived tail, no draws.

    `expansion`: that of a row with images, whose tokens vLLM counts.

    Raises `TeacherOutputInvalid` unless vLLM returned K + 1 entries for each target position.
    """
    stored = span_positions(sequence.target_spans)
    labels = sequence.token_ids[stored + 1]
    expansion = expansion or as_stored(sequence)
    positions, tokens = expansion.positions(stored), expansion.token_ids.size
    if len(flat.start_indices) != tokens:
        raise _invalid(sequence, f"{len(flat.start_indices)} runs of entries", f"one for each of {tokens}")
    starts = np.asarray(flat.start_indices, np.int64)[positions + 1]
    found = np.asarray(flat.end_indices, np.int64)[positions + 1] - starts
    if (found != top_k + 1).any():
        worst = int((found != top_k + 1).argmax())
        raise _invalid(sequence, f"{found[worst]} entries at position {positions[worst]}", f"{top_k + 1}")
    entries = starts[:, None] + np.arange(top_k + 1)
    all_ids = np.asarray(flat.token_ids, np.int32)[entries]
    all_logprobs = np.asarray(flat.logprobs, np.float64)[entries]
    if (all_ids[:, 0] != labels).any():
        raise _invalid(sequence, "log-probs of other tokens", "those of the prompt's own tokens")
    if np.isnan(all_logprobs).all(1).any():  # a softmax with a NaN or infinite logit is NaN everywhere
        return non_finite(sequence.sample_id, sequence.source_row)
    targets = targets_of_entries(
        labels,
        all_logprobs[:, 0],
        all_ids[:, 1:],
        all_logprobs[:, 1:],
        min_prob=min_prob,
        token_count=token_count,
        where=_where(sequence),
        fix=_FIX,
    )
    return ScoredSequence(sequence, targets)


def _invalid(sequence: TokenSequence, found: str, wanted: str) -> TeacherOutputInvalid:
    return TeacherOutputInvalid(_where(sequence), found=found, wanted=wanted, fix=_FIX)


def _where(sequence: TokenSequence) -> str:
    return f"vLLM's prompt log-probs of row {sequence.sample_id!r}"
