"""A smaller top-k loses no probability, and fewer draws are a uniform subset of the stored ones."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from coldstill.storage_schema.rows import CachedRow, TeacherTargets
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.data.subsample import with_fewer_draws, with_smaller_top_k
from coldstill.trainer.errors import MoreThanStored
from tests import making

from .datasets import make_rows

V = making.VOCABULARY


def teacher_targets(positions, *, top_k=8, draws=6, min_prob=0.0, seed=0, draw_logprobs=False):
    probs = making.random_probs(np.random.default_rng(seed), positions, V)
    labels = np.zeros(positions, int)
    return probs, making.targets_of(
        probs, labels, top_k=top_k, draws=draws, min_prob=min_prob, seed=seed, draw_logprobs=draw_logprobs
    )


def tail_shape(targets: TeacherTargets, weights: list[float], n: int) -> dict[int, float]:
    """The tail of position `n` by its weighted draws: id to share."""
    offsets = targets.draw_offsets
    shape: dict[int, float] = {}
    for at in range(int(offsets[n]), int(offsets[n + 1])):
        shape[int(targets.draw_ids[at])] = shape.get(int(targets.draw_ids[at]), 0.0) + float(weights[at])
    return shape


@pytest.mark.parametrize("min_prob", [0.0, 0.03])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_a_smaller_top_k_keeps_the_most_probable_ids_and_moves_the_rest_to_the_tail_exactly(top_k, min_prob):
    _, stored = teacher_targets(60, min_prob=min_prob)
    reduced, weights = with_smaller_top_k(stored, top_k)
    reduced.check(token_count=V)
    for n in range(stored.positions):
        count = int(stored.counts[n])
        logs = {int(stored.ids[n, k]): float(stored.logprobs[n, k]) for k in range(count)}
        order = sorted(logs, key=lambda token: -logs[token])
        kept, cut = order[:top_k], order[top_k:]
        assert {int(token) for token in reduced.ids[n, : reduced.counts[n]]} == set(kept)
        for k in range(top_k):
            used = k < reduced.counts[n]
            assert float(reduced.logprobs[n, k]) == (logs[int(reduced.ids[n, k])] if used else -math.inf)

        mass = math.exp(stored.log_tail[n]) + sum(math.exp(logs[token]) for token in cut)
        assert float(reduced.log_tail[n]) == pytest.approx(math.log(mass), abs=1e-5)
        drawn = stored.draw_ids[stored.draw_offsets[n] : stored.draw_offsets[n + 1]].tolist()
        wanted = {token: math.exp(logs[token]) / mass for token in cut}
        for token in drawn:
            wanted[token] = wanted.get(token, 0) + math.exp(stored.log_tail[n]) / mass / len(drawn)
        assert tail_shape(reduced, weights, n) == pytest.approx(wanted, abs=1e-6)


def test_weights_sum_to_one_with_draws_and_to_less_without():
    _, stored = teacher_targets(80, draws=1)
    assert 0 < int((stored.draw_counts == 0).sum()) < 80
    reduced, weights = with_smaller_top_k(stored, 4)
    sums = np.add.reduceat(weights, reduced.draw_offsets[:-1])
    assert sums[stored.draw_counts > 0] == pytest.approx(1, abs=1e-6)
    assert (sums[stored.draw_counts == 0] < 1).all()


def test_the_tail_of_a_smaller_top_k_is_unbiased_over_draws():
    probs, _ = teacher_targets(1, seed=3)
    total = np.zeros(V)
    runs = 3000
    for seed in range(runs):
        stored = making.targets_of(probs, np.zeros(1, int), top_k=8, draws=24, seed=seed)
        reduced, weights = with_smaller_top_k(stored, 3)
        np.add.at(total, reduced.draw_ids, weights)
    wanted = probs[0].copy()
    wanted[np.argsort(-probs[0])[:3]] = 0
    wanted /= wanted.sum()
    assert np.abs(total / runs - wanted).max() < 4 * np.sqrt(wanted.max() / runs / 4)


def test_draws_and_cut_ids_keep_their_log_probs():
    probs, stored = teacher_targets(40, draw_logprobs=True)
    reduced, _ = with_smaller_top_k(stored, 3)
    assert reduced.draw_logprobs is not None
    owner = np.repeat(np.arange(40), reduced.draw_counts)
    assert reduced.draw_logprobs == pytest.approx(np.log(probs[owner, reduced.draw_ids]), abs=1e-5)


def test_of_equal_log_probs_the_first_stay():
    ties = TeacherTargets(
        ids=np.array([[9, 5, 7, 3]], np.int32),
        logprobs=np.log(np.array([[0.2, 0.3, 0.2, 0.2]], np.float32)),
        counts=np.array([4], np.int32),
        log_tail=np.log(np.array([0.1], np.float32)),
        label_logprob=np.zeros(1, np.float32),
        draw_ids=np.empty(0, np.int32),
        draw_counts=np.zeros(1, np.int32),
    )
    assert with_smaller_top_k(ties, 2).targets.ids.tolist() == [[9, 5]]


def wide_row(sample_id: str, *, positions: int, kept: int) -> CachedRow:
    """Every position keeps the draws 10, 11, .. of the 16 that were taken."""
    _, targets = teacher_targets(positions, draws=0)
    draws = np.tile(np.arange(10, 10 + kept, dtype=np.int32), positions)
    counts = np.full(positions, kept, np.int32)
    return CachedRow(
        sample_id=sample_id,
        token_ids=np.zeros(positions + 1, np.int32),
        target_spans=np.array([[0, positions]], np.int32),
        targets=replace(targets, draw_ids=draws, draw_counts=counts),
    )


def test_fewer_draws_are_distributed_as_those_of_a_capture_with_fewer():
    """Of 16 draws, 10 in the tail, a uniform subset of 6 has a hypergeometric number in the tail, none preferred."""
    positions = 6_000
    reduced = with_fewer_draws(wide_row("r", positions=positions, kept=10), taken=16, wanted=6, seed=0).targets
    counts = np.bincount(reduced.draw_counts, minlength=7)
    for n in range(7):
        chance = math.comb(10, n) * math.comb(6, 6 - n) / math.comb(16, 6)
        assert abs(counts[n] - positions * chance) <= 4 * math.sqrt(positions * chance) + 1
    of_each = np.bincount(reduced.draw_ids, minlength=20)[10:]
    assert abs(of_each - positions * 6 / 16).max() < 4 * math.sqrt(positions * 6 / 16 * 10 / 16)


def test_the_subset_depends_on_seed_sample_and_position_alone():
    row = wide_row("r", positions=30, kept=10)
    whole = with_fewer_draws(row, taken=16, wanted=6, seed=0).targets
    part = replace(row, target_spans=np.array([[4, 6], [20, 29]], np.int32))
    part = replace(part, targets=joined_positions(row.targets, part.positions))
    assert_same_draws(
        with_fewer_draws(part, taken=16, wanted=6, seed=0).targets, joined_positions(whole, part.positions)
    )
    for other in (
        with_fewer_draws(row, taken=16, wanted=6, seed=1),
        with_fewer_draws(replace(row, sample_id="s"), taken=16, wanted=6, seed=0),
    ):
        assert other.targets.draw_ids.tolist() != whole.draw_ids.tolist()


def test_zero_draws_are_allowed():
    reduced = with_fewer_draws(wide_row("r", positions=5, kept=10), taken=16, wanted=0, seed=0).targets
    assert reduced.draw_ids.size == reduced.draw_counts.sum() == 0


def test_log_probs_stay_with_their_draws():
    row = make_rows(1, draw_logprobs=True)[0]
    known = dict(zip(row.targets.draw_logprobs.tolist(), row.targets.draw_ids.tolist(), strict=True))
    reduced = with_fewer_draws(row, taken=4, wanted=2, seed=0).targets
    assert 0 < reduced.draw_ids.size < row.targets.draw_ids.size
    assert [known[log] for log in reduced.draw_logprobs.tolist()] == reduced.draw_ids.tolist()


def joined_positions(targets: TeacherTargets, positions: np.ndarray) -> TeacherTargets:
    parts = [targets.slice(n, n + 1) for n in positions.tolist()]
    return replace(
        targets,
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "logprobs", "counts", "log_tail", "label_logprob", "draw_ids", "draw_counts")
        },
    )


def assert_same_draws(one: TeacherTargets, other: TeacherTargets) -> None:
    assert one.draw_counts.tolist() == other.draw_counts.tolist()
    assert one.draw_ids.tolist() == other.draw_ids.tolist()


def test_a_stream_yields_the_chosen_numbers_and_the_header_has_them(grouped):
    dataset = load_logit_dataset(grouped, top_k=3, draws=2)
    assert (dataset.header.top_k, dataset.header.draws, dataset.header.kept_draws) == (3, 2, 2)
    whole = {b["sample_ids"][0]: b for b in load_logit_dataset(grouped).stream(batch_size=1, seed=0, epochs=1)}
    for batch in islice(dataset.stream(batch_size=1, seed=0), 20):
        targets, stored = batch["targets"], whole[batch["sample_ids"][0]]["targets"]
        assert targets.ids.shape[1] == 3
        assert (targets.log_tail > stored.log_tail).all()
        old = [(weights > 0).sum() for weights in stored.draw_weights]
        new = [(weights > 0).sum() - 5 for weights in targets.draw_weights]
        assert all(n <= min(o, 2) for n, o in zip(new, old, strict=True))
    assert dataset.mean_tail_mass() > load_logit_dataset(grouped).mean_tail_mass()


@pytest.mark.parametrize("choice", [{"top_k": 9}, {"top_k": 0}, {"draws": 5}, {"draws": -1}])
def test_more_than_stored_is_a_named_error(grouped, choice):
    with pytest.raises(MoreThanStored, match=next(iter(choice))):
        load_logit_dataset(grouped, **choice)


def test_fewer_of_systematic_draws_are_still_an_unbiased_sample_of_the_tail():
    """Rows are one position with draws at all shifts. The bound is five standard errors of independent draws."""
    shifts, taken, tail = 5000, 9, np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    points = (np.arange(taken) + (np.arange(shifts)[:, None] + 0.5) / shifts) / taken
    draws = 10 + np.searchsorted(np.cumsum(tail), points.ravel(), side="right").astype(np.int32)
    _, targets = teacher_targets(shifts, draws=0)
    targets = replace(targets, draw_ids=draws, draw_counts=np.full(shifts, taken, np.int32))
    row = CachedRow(
        sample_id="a",
        token_ids=np.zeros(shifts + 1, np.int32),
        target_spans=np.array([[0, shifts]], np.int32),
        targets=targets,
    )
    fewer = with_fewer_draws(row, taken=taken, wanted=3, seed=1).targets
    assert set(fewer.draw_counts.tolist()) == {3}
    shares = np.bincount(fewer.draw_ids - 10, minlength=5) / fewer.draw_ids.size
    assert (np.abs(shares - tail) < 5 * np.sqrt(tail * (1 - tail) / fewer.draw_ids.size)).all()
