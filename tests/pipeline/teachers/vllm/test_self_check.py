"""Laws of the self-check: paths that agree pass, whatever their rounding; a path that is off by a position does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.teachers.target_extractor import summarize
from coldstill.pipeline.teachers.vllm.self_check import largest_difference, self_check_sequences
from coldstill.storage_schema.rows import TeacherTargets, span_positions

V = 300
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
SEQUENCES = self_check_sequences(token_count=V, max_length=150)


def _score(sequences: Sequence[TokenSequence], *, shift: int = 0, noise: float = 0.0) -> list[TeacherTargets]:
    """A teacher whose logits depend on the token before alone."""
    scored = []
    for sequence in sequences:
        positions = span_positions(sequence.target_spans)
        tokens = torch.from_numpy(sequence.token_ids.astype(np.int64))
        logits = TABLE[tokens[np.maximum(positions - shift, 0)]]
        logits = logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(sequences)))
        scored.append(
            summarize(
                logits, tokens[positions + 1], np.empty((positions.size, 0)),
                top_k=5, min_prob=0.0, kept_draws=0, token_count=V,
            )
        )  # fmt: skip
    return scored


def test_sequences_fit_the_longest_row_and_share_a_prefix() -> None:
    assert max(sequence.token_ids.size for sequence in SEQUENCES) == 150
    np.testing.assert_array_equal(SEQUENCES[3].token_ids[:64], SEQUENCES[4].token_ids)
    assert len(self_check_sequences(token_count=V, max_length=2)) == len(SEQUENCES)


def test_paths_that_agree_pass_and_the_difference_is_told() -> None:
    assert largest_difference(_score, _score, SEQUENCES, is_float32=True) == 0
    found = largest_difference(lambda some: _score(some, noise=1e-6), _score, SEQUENCES, is_float32=True)
    assert 0 < found < 5e-5


def test_paths_may_differ_as_much_as_the_engine_differs_from_itself() -> None:
    largest_difference(
        lambda some: _score(some, noise=1e-3), lambda some: _score(some, noise=1e-3), SEQUENCES, is_float32=True
    )
    with pytest.raises(TeacherOutputInvalid, match="at most 5e-05"):
        largest_difference(lambda some: _score(some, noise=1e-3), _score, SEQUENCES, is_float32=True)


@pytest.mark.parametrize("is_float32", [True, False])
def test_a_path_that_is_off_by_a_position_is_refused(is_float32: bool) -> None:
    with pytest.raises(TeacherOutputInvalid, match=r"(?s)scored together.*tap: public"):
        largest_difference(lambda some: _score(some, shift=1), _score, SEQUENCES, is_float32=is_float32)


def test_a_path_that_is_wrong_only_in_company_is_refused() -> None:
    def tap(sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        return _score(sequences, shift=int(sequences[0].sample_id != "self-check-0" and len(sequences) > 1))

    with pytest.raises(TeacherOutputInvalid, match="in reverse order"):
        largest_difference(tap, _score, SEQUENCES, is_float32=True)


def test_a_value_that_is_no_number_is_refused() -> None:
    def tap(sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        return [replace(one, label_logprob=np.full_like(one.label_logprob, np.nan)) for one in _score(sequences)]

    with pytest.raises(TeacherOutputInvalid):
        largest_difference(tap, _score, SEQUENCES, is_float32=True)
