"""The self-check: compares the tap's log-probs with those of vLLM's public path, at each engine start.

Both score six sequences of random tokens; the tap scores them together, alone and in reverse order. If the two differ
by more than the public path differs from itself, the engine is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.rows import TeacherTargets

_LENGTHS = (2, 16, 17, 96, 64, 200)
"""Tokens of each sequence. The fifth is a prefix of the fourth, which a prefix cache would find."""
_FLOAT32_TOLERANCE = 5e-5
_ROUNDED_TOLERANCE = 2.0**-6
"""Relative to the size of a log-prob, for logits with 8 bits of mantissa."""

Score = Callable[[Sequence[TokenSequence]], list[TeacherTargets]]


def self_check_sequences(*, token_count: int, max_length: int) -> list[TokenSequence]:
    """Sequences of random tokens; all positions are targets."""
    generator = np.random.default_rng(0)
    shared = generator.integers(0, token_count, max(_LENGTHS)).astype(np.int32)
    sequences = []
    for number, wanted in enumerate(_LENGTHS):
        length = min(wanted, max_length)
        tokens = generator.integers(0, token_count, length).astype(np.int32)
        if number in (3, 4):
            tokens[:64] = shared[: min(64, length)]
        sequences.append(
            TokenSequence(
                sample_id=f"self-check-{number}",
                source_row=number,
                token_ids=tokens,
                target_spans=np.array([[0, length - 1]], np.int32),
            )
        )
    return sequences


def largest_difference(tap: Score, public: Score, sequences: Sequence[TokenSequence], *, is_float32: bool) -> float:
    """The largest difference of a log-prob between the two paths, nats.

    Raises `TeacherOutputInvalid` if it exceeds both rounding and twice the difference between two runs of the public
    path.
    """
    together = public(sequences)
    alone = [public([sequence])[0] for sequence in sequences]
    own = max(_differences(together, alone))
    rounding = _FLOAT32_TOLERANCE
    if not is_float32:
        rounding = _ROUNDED_TOLERANCE * max(float(np.abs(one.label_logprob).max()) for one in together)
    tolerance = max(rounding, 2 * own)
    ways = {
        "together": tap(sequences),
        "in reverse order": tap(sequences[::-1])[::-1],
        "alone": [tap([sequence])[0] for sequence in sequences],
    }
    worst = 0.0
    for way, targets in ways.items():
        for sequence, difference in zip(sequences, _differences(targets, together), strict=True):
            if not difference <= tolerance:
                raise TeacherOutputInvalid(
                    f"self-check of the tap, on a sequence of {sequence.token_ids.size} tokens scored {way}",
                    found=f"log-probs {difference:.2g} from those of vLLM's public path",
                    wanted=f"at most {tolerance:.2g}",
                    fix="set teacher.tap: public, and report the versions of vLLM and torch",
                )
            worst = max(worst, difference)
    return worst


def _differences(some: Sequence[TeacherTargets], others: Sequence[TeacherTargets]) -> list[float]:
    """The largest difference of each sequence, in the label's log-prob and the kept log-probs. These are compared by
    rank, because ties may be swapped."""
    return [
        max(
            float(np.abs(one.label_logprob - other.label_logprob).max()),
            float(np.abs(_by_rank(one) - _by_rank(other)).max()),
        )
        for one, other in zip(some, others, strict=True)
    ]


def _by_rank(targets: TeacherTargets) -> np.ndarray:
    return np.nan_to_num(-np.sort(-targets.logprobs, axis=1), neginf=-1e3)
