"""Helpers of the benchmarks' tests."""

from __future__ import annotations

import numpy as np

from benchmarks.codec.rivals import Rival, Stored
from coldstill.storage_schema.rows import CachedRow, span_positions, spans_from_mask
from tests.making import random_probs, targets_of


def rows(*, top_k: int, vocabulary: int = 400, count: int = 2, sharpness: float = 2.0) -> list[CachedRow]:
    """Rows of random teachers, each with 9 to 10 positions that keep `top_k` of `vocabulary` ids."""
    rng = np.random.default_rng(top_k)
    made = []
    for number in range(count):
        tokens = rng.integers(0, vocabulary, 10 + number, dtype=np.int32)
        spans = spans_from_mask(np.ones(tokens.size, bool))
        probs = random_probs(rng, tokens.size - 1, vocabulary, sharpness=sharpness)
        targets = targets_of(probs, tokens[span_positions(spans) + 1], top_k=top_k)
        made.append(CachedRow(sample_id=str(number), token_ids=tokens, target_spans=spans, targets=targets))
    return made


def through(rival: Rival, made: list[CachedRow]) -> list[Stored]:
    """What a rival gives back of rows."""
    return list(rival.decode(rival.encode(made)))
