"""Laws of the self-check: paths that agree pass, whatever their rounding; each fault that the tap could have does not.

The teacher here is a table: its hidden state depends on the token before, its head is a matrix. Faults are injected
into the side that stands for the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from coldstill.pipeline.errors import TeacherOutputInvalid, TeacherUnusable
from coldstill.pipeline.teachers.protocol import ScoredSequence, ScoreResult, TokenSequence, non_finite
from coldstill.pipeline.teachers.target_extractor import summarize
from coldstill.pipeline.teachers.vllm.self_check import (
    Agreement,
    Arithmetic,
    check_agreement,
    self_check_sequences,
)
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from tests import making

V, WIDTH, CAP = 300, 48, 30.0
_RANDOM = torch.Generator().manual_seed(0)
STATES, HEAD = torch.randn(V, WIDTH, generator=_RANDOM), torch.randn(WIDTH, V, generator=_RANDOM)
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> DatasetHeader:
    tokenizer = making.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    changes = {"token_count": V, "vocab_size": V, "max_length": 150}
    return making.tiny_header(tokenizer, top_k=5).model_copy(update=changes)


class Side:
    """One of the two paths, with faults."""

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        shift: int = 0,
        states: Callable[[TokenSequence, torch.Tensor], torch.Tensor] = lambda _, states: states,
        cap: float = CAP,
        change: Change = lambda logits: logits,
        columns: int = V,
        softmax_noise: float = 0.0,
        blocks: int = 1,
    ):
        self.dtype, self.scale, self.shift, self.states, self.cap = dtype, scale, shift, states, cap
        self.change, self.columns, self.softmax_noise, self.blocks = change, columns, softmax_noise, blocks
        self.largest = 0.0

    def __call__(self, sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        return [ScoredSequence(sequence, self._targets(sequence)) for sequence in sequences]

    def logits(self, sequence: TokenSequence) -> torch.Tensor:
        positions = span_positions(sequence.target_spans)
        tokens = torch.from_numpy(sequence.token_ids.astype(np.int64))
        states = self.states(sequence, STATES[tokens[np.maximum(positions - self.shift, 0)]])
        parts = zip(states.chunk(self.blocks, 1), (self.scale * HEAD).chunk(self.blocks, 0), strict=True)
        summed = sum((rows @ head for rows, head in parts), torch.zeros(()))  # another order of additions
        assert isinstance(summed, torch.Tensor)
        logits = summed.to(self.dtype)
        self.largest = max(self.largest, float(logits.abs().max()))
        return self.change(self.cap * torch.tanh(logits / self.cap)).float()

    def _targets(self, sequence: TokenSequence) -> TeacherTargets:
        positions = span_positions(sequence.target_spans)
        labels = torch.from_numpy(sequence.token_ids.astype(np.int64))[positions + 1]
        targets = summarize(
            self.logits(sequence)[:, : self.columns], labels.clamp(max=self.columns - 1),
            np.empty((positions.size, 0)), top_k=5, min_prob=0.0, kept_draws=0, token_count=self.columns,
        )  # fmt: skip
        noise = np.random.default_rng(len(labels)).uniform(0, self.softmax_noise, (positions.size, 1)).astype("f4")
        return replace(targets, logprobs=targets.logprobs + noise, label_logprob=targets.label_logprob + noise[:, 0])


def _check(tap: Side, public: Side, header: DatasetHeader, *, head_dtype: str = "float32") -> Agreement:
    facts = Arithmetic(width=WIDTH, vocab_size=V, largest_logit=0.0, head_dtype=head_dtype)
    return check_agreement(tap, public, header, lambda: facts._replace(largest_logit=tap.largest))


def test_sequences_fit_the_longest_row_and_share_prefixes(header: DatasetHeader) -> None:
    sequences = self_check_sequences(header, seed=0)
    assert max(sequence.token_ids.size for sequence in sequences) == 150
    np.testing.assert_array_equal(sequences[3].token_ids[:64], sequences[4].token_ids)
    np.testing.assert_array_equal(sequences[5].token_ids[:17], sequences[2].token_ids)
    assert len(self_check_sequences(header.model_copy(update={"max_length": 2}), seed=0)) == len(sequences)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_paths_that_differ_by_the_order_of_additions_alone_pass(
    header: DatasetHeader, dtype: torch.dtype, scale: float
) -> None:
    sides = [Side(dtype=dtype, scale=scale, cap=1e9, blocks=blocks) for blocks in (1, 6)]
    found = _check(*sides, header, head_dtype=str(dtype).removeprefix("torch."))
    assert found.kl <= found.kl_limit
    assert found.logprob > 0 or dtype != torch.float32, "nothing differs: the test proves nothing"


def test_the_error_of_a_float32_sum_over_a_large_vocabulary_passes_and_a_missing_share_does_not() -> None:
    """Gemma 3 270M: 8.5e-5 at V = 262,144, width 640, logits of up to 30; the KL was 3e-14."""
    facts = Arithmetic(width=640, vocab_size=262_144, largest_logit=30.0, head_dtype="float32")
    limit = facts.logprob(np.array([-12.0], np.float32))[0]
    assert 8.5e-5 < limit < 0.01
    assert facts.logit**2 / 2 < 1e-6


def test_limits_grow_with_what_the_arithmetic_depends_on_and_with_nothing_else() -> None:
    facts = Arithmetic(width=640, vocab_size=32_000, largest_logit=30.0, head_dtype="float32")
    near, far = facts.logprob(np.array([-12.0, -1e4], np.float32))
    assert near < 1e-2 < far  # a masked id is compared relative to its size
    assert facts._replace(width=2560).logit > 1.5 * facts.logit
    assert facts._replace(largest_logit=60.0).logit == pytest.approx(2 * facts.logit, rel=0.05)
    assert facts._replace(head_dtype="bfloat16").logit > 100 * facts.logit


def test_paths_may_differ_as_much_as_the_engine_differs_from_itself(header: DatasetHeader) -> None:
    """A body in half precision: its hidden states depend on what else is in the batch."""

    class Noisy(Side):
        calls = 0

        def logits(self, sequence: TokenSequence) -> torch.Tensor:
            self.calls += 1
            generator = torch.Generator().manual_seed(self.calls)
            exact = super().logits(sequence)
            return exact + 1e-2 * torch.randn(exact.shape, generator=generator)

    _check(Noisy(), Noisy(), header)
    with pytest.raises(TeacherOutputInvalid, match="a KL of"):
        _check(Noisy(), Side(), header)


def _stale(sequence: TokenSequence, states: torch.Tensor) -> torch.Tensor:
    """The rows of the cached prefix are those of another sequence."""
    return torch.cat([states[:16].flip(0), states[16:]]) if len(states) in (63, 16) else states


def _zeros(sequence: TokenSequence, states: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(states[:16]), states[16:]]) if len(states) in (63, 16) else states


def _one_late(sequence: TokenSequence, states: torch.Tensor) -> torch.Tensor:
    """One row behind the cached prefix."""
    return torch.cat([states[:16], states[15:-1]]) if len(states) > 16 else states


FAULTS = {
    "a shift by one position": Side(shift=1),
    "stale rows of a cached prefix": Side(states=_stale),
    "empty rows of a cached prefix": Side(states=_zeros),
    "rows behind a cached prefix that start one late": Side(states=_one_late),
    "no soft cap": Side(cap=1e9),
    "temperature": Side(change=lambda logits: logits / 0.9),
    "a temperature of almost 1": Side(change=lambda logits: logits / 0.999),
    "another scale": Side(change=lambda logits: logits * 16),
    "a softmax over a cut vocabulary": Side(columns=V - 8),
    "a softmax that leaves out one id": Side(columns=V - 1),
    "a bias of one id": Side(change=lambda logits: logits + torch.eye(V)[7]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_tap_is_refused(header: DatasetHeader, fault: str) -> None:
    with pytest.raises(TeacherOutputInvalid, match=r"(?s)scored (together|alone|in reverse).*tap: public"):
        _check(FAULTS[fault], Side(), header)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "fault", [{"shift": 1}, {"states": _stale}, {"cap": 1e9}, {"change": lambda logits: logits / 0.7}]
)
def test_gross_faults_are_refused_with_a_rounded_head_too(
    header: DatasetHeader, fault: dict[str, object], dtype: torch.dtype
) -> None:
    """Logits of up to 40 here, as real teachers have, against a cap of 30."""
    tap = Side(scale=1.2, dtype=dtype, **fault)  # type: ignore[arg-type]
    with pytest.raises(TeacherOutputInvalid):
        _check(tap, Side(scale=1.2, dtype=dtype), header, head_dtype=str(dtype).removeprefix("torch."))


def test_an_error_of_the_normalizer_alone_is_within_the_limit_of_a_log_prob_only_up_to_its_derivation(
    header: DatasetHeader,
) -> None:
    possible = V / 4 * 2.0**-24
    assert _check(Side(softmax_noise=0.9 * possible), Side(), header).kl < 1e-11
    with pytest.raises(TeacherOutputInvalid, match="log-probs that differ by"):
        _check(Side(softmax_noise=0.01), Side(), header)


def test_a_path_that_is_wrong_only_in_company_is_refused(header: DatasetHeader) -> None:
    right, wrong = Side(), Side(shift=1)

    def tap(sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        return (wrong if sequences[0].sample_id != "self-check-0" and len(sequences) > 1 else right)(sequences)

    facts = Arithmetic(width=WIDTH, vocab_size=V, largest_logit=30.0, head_dtype="float32")
    with pytest.raises(TeacherOutputInvalid, match="in reverse order"):
        check_agreement(tap, Side(), header, lambda: facts)


def test_a_value_that_is_no_number_is_refused(header: DatasetHeader) -> None:
    class Broken(Side):
        def _targets(self, sequence: TokenSequence) -> TeacherTargets:
            targets = super()._targets(sequence)
            return replace(targets, label_logprob=np.full_like(targets.label_logprob, np.nan))

    with pytest.raises(TeacherOutputInvalid):
        _check(Broken(), Side(), header)


def test_a_tap_that_gives_no_numbers_where_the_public_path_does_is_refused(header: DatasetHeader) -> None:
    def tap(sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        return [non_finite(sequence.sample_id, sequence.source_row) for sequence in sequences]

    with pytest.raises(TeacherOutputInvalid, match="NaN or infinite logits"):
        check_agreement(tap, Side(), header, lambda: pytest.fail("not reached"))


def test_weights_without_finite_logits_are_named_and_a_single_such_token_is_passed_over(header: DatasetHeader) -> None:
    def public(sequences: Sequence[TokenSequence]) -> list[ScoreResult]:
        return [
            non_finite(sequence.sample_id, sequence.source_row) if poison in sequence.token_ids else scored
            for sequence, scored in zip(sequences, Side()(sequences), strict=True)
        ]

    sets = [np.concatenate([one.token_ids for one in self_check_sequences(header, seed=seed)]) for seed in range(3)]
    in_all = set(sets[0]) & set(sets[1]) & set(sets[2])
    facts = Arithmetic(width=WIDTH, vocab_size=V, largest_logit=30.0, head_dtype="float32")
    (poison, *_) = (token for token in range(V) if token in sets[0] and token not in in_all)
    check_agreement(Side(), public, header, lambda: facts)
    poison = min(in_all)
    with pytest.raises(TeacherUnusable, match=r"(?s)weights of tiny.*NaN or infinite logits.*finite logits"):
        check_agreement(Side(), public, header, lambda: facts)


def test_a_masked_id_may_have_any_size(header: DatasetHeader) -> None:
    """Some models set the logits of unused ids to -inf or to the least float."""
    for value in (-torch.inf, torch.finfo(torch.float32).min, -1e9):
        mask = torch.zeros(V).index_fill_(0, torch.arange(40), value)
        _check(Side(change=mask.add), Side(change=mask.add), header)
