"""The facts of a row equal the plainest code, for any order of the kept entries."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.inspect.row_facts import row_facts
from tests import making


def shuffled(row: CachedRow, *, seed: int) -> CachedRow:
    """The same row with the entries of each position in another order."""
    rng = np.random.default_rng(seed)
    ids, logprobs = row.targets.ids.copy(), row.targets.logprobs.copy()
    for n, count in enumerate(row.targets.counts):
        order = rng.permutation(count)
        ids[n, :count], logprobs[n, :count] = ids[n, order], logprobs[n, order]
        ids[n, count:] = ids[n, 0]
    return replace(row, targets=replace(row.targets, ids=ids, logprobs=logprobs))


def row_with_floor(seed: int) -> CachedRow:
    rng = np.random.default_rng(seed)
    row = making.random_row(rng, "row", length=40)
    probs = making.random_probs(rng, row.targets.positions, making.VOCABULARY)
    targets = making.targets_of(probs, row.labels, top_k=8, min_prob=0.03, draws=4)
    assert (targets.counts < 8).any()
    return replace(row, targets=targets)


@pytest.mark.parametrize("seed", range(4))
def test_facts_are_those_of_the_plainest_code(seed: int) -> None:
    row = shuffled(row_with_floor(seed), seed=seed)
    facts = row_facts(row)
    for n in range(row.targets.positions):
        count = int(row.targets.counts[n])
        kept = [(float(row.targets.logprobs[n, k]), int(row.targets.ids[n, k])) for k in range(count)]
        kept.sort(key=lambda entry: (-entry[0], entry[1]))
        log_tail = float(row.targets.log_tail[n])
        entropy = -sum(math.exp(value) * value for value, _ in kept) - math.exp(log_tail) * log_tail
        assert facts.entropy[n] == pytest.approx(entropy, abs=1e-9)
        assert facts.tail_mass[n] == pytest.approx(math.exp(log_tail), abs=1e-12)
        assert facts.ids[n, :count].tolist() == [token_id for _, token_id in kept]
        assert facts.probs[n, :count] == pytest.approx([math.exp(value) for value, _ in kept], abs=1e-12)
        assert facts.ids[n, count:].tolist() == [-1] * (8 - count)
        assert facts.probs[n, count:].tolist() == [0.0] * (8 - count)
        label = int(row.token_ids[row.positions[n] + 1])
        ranks = [place for place, (_, token_id) in enumerate(kept, start=1) if token_id == label]
        assert facts.label_rank[n] == (ranks[0] if ranks else 0)
        assert facts.surprise[n] == pytest.approx(-float(row.targets.label_logprob[n]), abs=1e-12)


def test_the_order_of_the_kept_entries_changes_nothing() -> None:
    row = row_with_floor(9)
    one, other = row_facts(row), row_facts(shuffled(row, seed=1))
    assert (one.ids == other.ids).all()
    assert (one.label_rank == other.label_rank).all()
    np.testing.assert_array_equal(one.probs, other.probs)
    np.testing.assert_allclose(one.entropy, other.entropy, rtol=1e-12)


def test_the_entropy_is_a_lower_bound_of_the_teachers_and_equal_where_nothing_is_left_out() -> None:
    rng = np.random.default_rng(3)
    row = making.random_row(rng, "row", length=30)
    probs = making.random_probs(rng, row.targets.positions, making.VOCABULARY)
    true = -(probs * np.log(probs)).sum(1)
    for top_k in (1, 8, making.VOCABULARY):
        facts = row_facts(replace(row, targets=making.targets_of(probs, row.labels, top_k=top_k)))
        assert (facts.entropy <= true + 1e-5).all()
    np.testing.assert_allclose(facts.entropy, true, atol=1e-5)


def test_mass_is_one_and_the_label_has_one_probability() -> None:
    facts = row_facts(making.random_row(np.random.default_rng(1), "row", length=40))
    np.testing.assert_allclose(facts.probs.sum(1) + facts.tail_mass, 1, atol=1e-5)
    kept = np.flatnonzero(facts.label_rank)
    np.testing.assert_allclose(facts.probs[kept, facts.label_rank[kept] - 1], facts.label_probs[kept], atol=1e-6)
