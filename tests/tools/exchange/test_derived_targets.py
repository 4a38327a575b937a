"""What an import derives: the tail, the label's log-prob, and which entries are kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.storage_schema.rows import TeacherTargets
from coldstill.tools.errors import NotFullSoftmax, UnusableRow
from coldstill.tools.exchange.derived_targets import MIN_TAIL, derived_targets
from tests.making import random_probs

VOCABULARY = 32


def derive(ids: Any, logprobs: Any, *, label: int = 0, **changes: Any) -> TeacherTargets:
    """One position through the real thing."""
    fields = {"token_count": VOCABULARY, "top_k": len(ids), **changes}
    targets = derived_targets(
        np.array([ids], np.int64),
        np.array([logprobs], np.float64),
        present=np.ones((1, len(ids)), bool),
        labels=np.array([label]),
        **fields,
    )
    targets.check(token_count=fields["token_count"])
    return targets


def test_the_tail_is_what_the_kept_ids_leave_of_1() -> None:
    targets = derive([3, 1], np.log([0.5, 0.25]), label=3)
    assert targets.ids.tolist() == [[3, 1]]
    np.testing.assert_allclose(np.exp(targets.log_tail), [0.25], rtol=1e-6)
    np.testing.assert_allclose(np.exp(targets.label_logprob), [0.5], rtol=1e-6)


def test_a_sum_above_1_is_scaled_down_and_leaves_the_least_tail() -> None:
    targets = derive([3, 1], np.log([0.8, 0.22]))
    total = 1.02 + MIN_TAIL
    np.testing.assert_allclose(np.exp(targets.logprobs[0].astype(float)), np.array([0.8, 0.22]) / total, rtol=1e-6)
    np.testing.assert_allclose(np.exp(targets.log_tail[0].astype(float)), MIN_TAIL / total, rtol=1e-5)


def test_a_label_outside_the_kept_ids_has_an_even_share_of_the_tail() -> None:
    targets = derive([3, 1], np.log([0.5, 0.25]), label=9)
    np.testing.assert_allclose(np.exp(targets.label_logprob), [0.25 / (VOCABULARY - 2)], rtol=1e-5)


def test_a_label_that_is_the_entry_beyond_top_k_keeps_its_own_logprob() -> None:
    targets = derive([3, 1, 9], np.log([0.5, 0.25, 0.01]), label=9, top_k=2)
    assert targets.counts.tolist() == [2]
    np.testing.assert_allclose(np.exp(targets.label_logprob), [0.01], rtol=1e-5)
    np.testing.assert_allclose(np.exp(targets.log_tail), [0.25], rtol=1e-5)


def test_ids_that_the_tokenizer_lacks_give_their_mass_to_the_tail() -> None:
    targets = derive([VOCABULARY + 5, 3, VOCABULARY], np.log([0.5, 0.25, 0.1]))
    assert targets.counts.tolist() == [1]
    assert targets.ids.tolist() == [[3, 3, 3]]
    np.testing.assert_allclose(np.exp(targets.log_tail), [0.75], rtol=1e-6)


@pytest.mark.parametrize("padding", [-math.inf, -9999.0, -1e9])
def test_padded_entries_with_any_ids_are_left_out(padding: float) -> None:
    targets = derive([3, 0, 0, 1 << 40, -7], [math.log(0.5), *[padding] * 4])
    assert targets.counts.tolist() == [1]


@pytest.mark.parametrize(
    ("ids", "logprobs", "words"),
    [
        ([3, 1], [-1.0, math.nan], "NaN"),
        ([3, 1], [-1.0, math.inf], "inf"),
        ([3, -1], [-1.0, -2.0], "negative"),
        ([3, 3], [-1.0, -2.0], "twice"),
        ([0, 0], [0.0, 0.0], "zeros"),
        ([40, 41], [-1.0, -2.0], "no entry"),
        ([3, 1], [-math.inf, -math.inf], "no entry"),
    ],
)
def test_entries_that_are_no_distribution_are_named(ids: list[int], logprobs: list[float], words: str) -> None:
    with pytest.raises(UnusableRow, match=words):
        derive(ids, logprobs)


def test_logits_are_no_logprobs() -> None:
    with pytest.raises(NotFullSoftmax, match="sum of at most 1"):
        derive([3, 1], [12.0, 8.0])
    with pytest.raises(NotFullSoftmax):
        derive([3, 1], [3000.0, 8.0])


@given(st.integers(0, 1 << 30), st.integers(1, VOCABULARY))
def test_every_derived_position_satisfies_the_laws_of_a_dataset(seed: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    probs = random_probs(rng, 5, VOCABULARY)
    ids = np.argsort(rng.random((5, VOCABULARY)), axis=1)[:, :top_k]
    labels = rng.integers(0, VOCABULARY, 5)
    targets = derived_targets(
        ids,
        np.log(np.take_along_axis(probs, ids, 1)),
        present=np.ones(ids.shape, bool),
        labels=labels,
        token_count=VOCABULARY,
        top_k=top_k,
    )
    targets.check(token_count=VOCABULARY)
    outside = ~(targets.ids == labels[:, None]).any(axis=1)
    assert (targets.label_logprob[outside] <= targets.log_tail[outside]).all()
    for n in range(5):
        kept = dict(zip(targets.ids[n].tolist(), targets.logprobs[n].tolist(), strict=True))
        for token, logprob in kept.items():
            assert abs(logprob - math.log(probs[n, token])) < 1e-4
