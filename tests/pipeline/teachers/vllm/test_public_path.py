"""Laws of the payload reader, on plain lists in vLLM's layout. The real payload: test_teachers_agree.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.protocol import ScoredSequence, TokenSequence, non_finite
from coldstill.pipeline.teachers.topk_entries import DERIVED_TAIL_FLOOR
from coldstill.pipeline.teachers.vllm.public_path import read_prompt_logprobs
from coldstill.storage_schema.rows import TeacherTargets, spans_from_mask
from tests import making

VOCABULARY, TOP_K, LENGTH = 20, 5, 9


def _sequence() -> TokenSequence:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH).astype(np.int32)
    return TokenSequence(
        sample_id="a", source_row=0, token_ids=tokens, target_spans=spans_from_mask([0, 1, 0, 1, 1, 0, 0, 1, 1])
    )


def _payload(sequence: TokenSequence, probs: np.ndarray) -> SimpleNamespace:
    """One run per token: none for the first, then the token's own entry and the K best of the row that predicts it."""
    flat = SimpleNamespace(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[])
    for token in range(1, LENGTH):
        p = probs[token - 1]
        ids = [int(sequence.token_ids[token]), *np.argsort(-p)[:TOP_K].tolist()]
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids.extend(ids)
        flat.logprobs.extend(np.log(p[ids]).tolist())
        flat.end_indices.append(len(flat.token_ids))
    return flat


def _read(flat: SimpleNamespace, sequence: TokenSequence, *, min_prob: float, token_count: int) -> TeacherTargets:
    result = read_prompt_logprobs(flat, sequence, top_k=TOP_K, min_prob=min_prob, token_count=token_count)
    assert isinstance(result, ScoredSequence)
    assert result.sequence is sequence
    return result.targets


@pytest.fixture
def probs() -> np.ndarray:
    return making.random_probs(np.random.default_rng(1), LENGTH - 1, VOCABULARY)


def test_run_of_token_j_is_target_position_j_minus_1(probs: np.ndarray) -> None:
    sequence = _sequence()
    targets = _read(_payload(sequence, probs), sequence, min_prob=0, token_count=VOCABULARY)
    targets.check(token_count=VOCABULARY)
    wanted = making.targets_of(probs[[0, 2, 3, 6, 7]], sequence.token_ids[[1, 3, 4, 7, 8]], top_k=TOP_K)
    np.testing.assert_array_equal(targets.ids, wanted.ids)
    for name in ("logprobs", "log_tail", "label_logprob"):
        np.testing.assert_allclose(getattr(targets, name), getattr(wanted, name), atol=1e-5)


def test_padding_ids_and_ids_under_the_floor_go_to_the_tail(probs: np.ndarray) -> None:
    sequence = _sequence()
    sequence = TokenSequence(
        sample_id="a",
        source_row=0,
        token_ids=np.minimum(sequence.token_ids, 14),
        target_spans=sequence.target_spans,
    )
    targets = _read(_payload(sequence, probs), sequence, min_prob=0.1, token_count=15)
    targets.check(token_count=15)
    for n, position in enumerate([0, 2, 3, 6, 7]):
        p = probs[position]
        allowed = [v for v in np.argsort(-p)[:TOP_K] if v < 15]
        kept = [v for rank, v in enumerate(allowed) if rank == 0 or p[v] >= 0.1]
        assert targets.ids[n, : targets.counts[n]].tolist() == kept
        np.testing.assert_allclose(np.exp(targets.log_tail[n]), 1 - p[kept].sum(), atol=1e-6)


def test_the_derived_tail_has_a_floor() -> None:
    probs = np.full((LENGTH - 1, VOCABULARY), 1e-12)
    probs[:, 3] = 1 - 1e-12 * (VOCABULARY - 1)
    sequence = _sequence()
    targets = _read(_payload(sequence, probs), sequence, min_prob=1e-4, token_count=VOCABULARY)
    np.testing.assert_allclose(targets.log_tail, np.log(DERIVED_TAIL_FLOOR), rtol=1e-5)
    outside = sequence.token_ids[[1, 3, 4, 7, 8]] != 3
    assert (targets.label_logprob[outside] <= targets.log_tail[outside]).all()


def test_a_missing_rank_is_an_error_never_a_guess(probs: np.ndarray) -> None:
    flat = _payload(_sequence(), probs)
    flat.end_indices[4] -= 1
    with pytest.raises(TeacherOutputInvalid, match="5 entries at position 3"):
        read_prompt_logprobs(flat, _sequence(), top_k=TOP_K, min_prob=0, token_count=VOCABULARY)


def test_a_missing_position_is_an_error(probs: np.ndarray) -> None:
    flat = _payload(_sequence(), probs)
    flat.start_indices.pop()
    with pytest.raises(TeacherOutputInvalid, match="8 runs"):
        read_prompt_logprobs(flat, _sequence(), top_k=TOP_K, min_prob=0, token_count=VOCABULARY)


def test_log_probs_of_other_tokens_are_an_error(probs: np.ndarray) -> None:
    flat = _payload(_sequence(), probs)
    flat.token_ids[flat.start_indices[1]] += 1
    with pytest.raises(TeacherOutputInvalid, match="other tokens"):
        read_prompt_logprobs(flat, _sequence(), top_k=TOP_K, min_prob=0, token_count=VOCABULARY)


def test_a_log_prob_that_is_no_number_is_an_error(probs: np.ndarray) -> None:
    flat = _payload(_sequence(), probs)
    flat.logprobs[flat.start_indices[1] + 2] = float("nan")
    with pytest.raises(TeacherOutputInvalid, match="not a number"):
        read_prompt_logprobs(flat, _sequence(), top_k=TOP_K, min_prob=0, token_count=VOCABULARY)


def test_a_position_of_nothing_but_nan_is_a_row_without_finite_logits(probs: np.ndarray) -> None:
    """A softmax with a NaN or infinite logit is NaN everywhere."""
    flat = _payload(_sequence(), probs)
    flat.logprobs[flat.start_indices[4] : flat.end_indices[4]] = [float("nan")] * (TOP_K + 1)
    read = read_prompt_logprobs(flat, _sequence(), top_k=TOP_K, min_prob=0, token_count=VOCABULARY)
    assert read == non_finite("a", 0)
