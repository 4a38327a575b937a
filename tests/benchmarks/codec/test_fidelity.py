"""KL over kept ids and tail equals the plain sum, ignores order, and counts mass."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from benchmarks.codec.fidelity import buckets, kl_nats, same_sets
from tests.making import random_probs, targets_of


def test_kl_is_the_plain_sum_of_renormalized_sides() -> None:
    rng = np.random.default_rng(0)
    p, q = random_probs(rng, 5, 7), random_probs(rng, 5, 7)
    wanted = [sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(kl_nats(np.log(p), np.log(q)), wanted)
    np.testing.assert_allclose(kl_nats(np.log(p) + 0.3, np.log(q) - 0.2), wanted)


def test_unused_entries_hold_no_mass_and_add_nothing() -> None:
    p = np.log(np.array([[0.5, 0.25, 0.25]]))
    q = np.log(np.array([[0.25, 0.5, 0.25]]))
    unused = np.full((1, 2), -np.inf)
    np.testing.assert_allclose(kl_nats(np.hstack([p, unused]), np.hstack([q, unused])), kl_nats(p, q))


def test_the_order_of_kept_ids_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    targets = targets_of(random_probs(rng, 6, 40), rng.integers(0, 40, 6), top_k=8)
    order = rng.permuted(np.tile(np.arange(8), (6, 1)), axis=1)
    ids, logprobs = (np.take_along_axis(values, order, 1) for values in (targets.ids, targets.logprobs))
    shuffled = replace(targets, ids=ids, logprobs=logprobs)
    assert same_sets(targets, shuffled)
    np.testing.assert_array_equal(buckets(targets), buckets(shuffled))
    np.testing.assert_allclose(kl_nats(buckets(targets), buckets(shuffled)), 0, atol=1e-15)


def test_another_set_of_ids_is_detected() -> None:
    rng = np.random.default_rng(2)
    targets = targets_of(random_probs(rng, 6, 40), rng.integers(0, 40, 6), top_k=8)
    other = targets.ids.copy()
    other[3, 5] = next(i for i in range(40) if i not in targets.ids[3])
    assert not same_sets(targets, replace(targets, ids=other))
