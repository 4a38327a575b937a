"""The check at an engine's start: the weights give finite logits.

Without it, broken weights (NaN in a shard, a data type in which the model overflows) would show as rejected rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.teachers.protocol import ScoredSequence, ScoreResult, TokenSequence, scored_of
from coldstill.storage_schema.header import DatasetHeader

TRIES = 3
"""Sets of random tokens. In one set a healthy teacher may meet a token whose embedding was never trained."""
_PROBE_LENGTHS = (2, 16, 17)

Score = Callable[[Sequence[TokenSequence]], Sequence[ScoreResult]]


def random_sequences(lengths: Sequence[int], header: DatasetHeader, *, seed: int) -> list[TokenSequence]:
    """Sequences of random tokens of at most these lengths; all positions are targets."""
    generator = np.random.default_rng(seed)
    sequences = []
    for number, length in enumerate(min(length, header.max_length) for length in lengths):
        token_ids = generator.integers(0, header.token_count, length).astype(np.int32)
        spans = np.array([[0, length - 1]], np.int32)
        name = f"self-check-{number}"
        sequences.append(TokenSequence(sample_id=name, source_row=number, token_ids=token_ids, target_spans=spans))
    return sequences


def require_finite(score: Score, sets: Iterator[Sequence[TokenSequence]], *, model: str) -> list[ScoredSequence]:
    """The results of the first set of sequences that all have finite logits. Raises `TeacherUnusable` if none has."""
    found = ""
    for sequences in sets:
        results = score(sequences)
        scored = scored_of(results)
        if len(scored) == len(sequences):
            return scored
        found = f"NaN or infinite logits in {len(sequences) - len(scored)} of {len(sequences)} short random sequences"
    raise TeacherUnusable(
        f"weights of {model}",
        found=found,
        wanted="finite logits",
        fix="check the model's files for NaN, or set another teacher.dtype: the model may overflow in this one",
    )


def check_weights(score: Score, header: DatasetHeader, *, model: str) -> None:
    """Score a few short sequences. Raises `TeacherUnusable`."""
    require_finite(score, (random_sequences(_PROBE_LENGTHS, header, seed=seed) for seed in range(TRIES)), model=model)
