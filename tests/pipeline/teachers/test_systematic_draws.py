"""Laws of systematic draws: against plain float64 formulas written here, position by position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coldstill.pipeline.teachers.target_extractor import draw_uniforms, summarize, uniform_count
from coldstill.storage_schema.rows import TeacherTargets

TOP_K, DRAWS = 4, 24


def _logits(positions: int, vocabulary: int, *, scale: float = 1.5) -> torch.Tensor:
    return scale * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(0))


def _drawn(logits: torch.Tensor, uniforms: np.ndarray, **changes: float) -> TeacherTargets:
    settings = {"top_k": TOP_K, "min_prob": 0.0, "kept_draws": DRAWS, "systematic_draws": DRAWS, **changes}
    labels = torch.zeros(len(logits)).long()
    targets = summarize(
        logits,
        labels,
        uniforms,
        token_count=logits.shape[1],
        draw_logprobs=True,
        **settings,  # type: ignore[arg-type]
    )
    targets.check(token_count=logits.shape[1])
    return targets


def _tail(logits: torch.Tensor, kept: np.ndarray) -> np.ndarray:
    """`float64 [V]`: the softmax of one position with 0 at the kept ids."""
    p = torch.softmax(logits.double(), -1).numpy()
    p[kept] = 0
    return p


@pytest.mark.parametrize("vocabulary", [70, 5000])
@pytest.mark.parametrize("min_prob", [0.0, 0.02])
@pytest.mark.parametrize("most", [5, DRAWS])
def test_systematic_draws_are_equally_spaced_points_of_the_tail_in_order_of_ids(
    vocabulary: int, min_prob: float, most: int
) -> None:
    logits, uniforms = _logits(60, vocabulary), np.random.default_rng(0).random((60, 2))
    targets = _drawn(logits, uniforms, min_prob=min_prob, kept_draws=most)
    offsets, right = targets.draw_offsets, 0
    for n, (shift, up) in enumerate(uniforms):
        tail = _tail(logits[n], targets.ids[n, : targets.counts[n]])
        number = min(math.floor(DRAWS * tail.sum() + up), most)
        points = [(place + shift) / number * tail.sum() for place in range(number)]
        wanted = [int(np.searchsorted(np.cumsum(tail), point, side="right")) for point in points]
        found = targets.draw_ids[offsets[n] : offsets[n + 1]]
        assert found.size == number
        right += int((found == wanted).sum())
        assert targets.draw_logprobs is not None
        np.testing.assert_allclose(targets.draw_logprobs[offsets[n] : offsets[n + 1]], np.log(tail[found]), atol=1e-5)
    assert right >= offsets[-1] - 1  # a point may lie where rounding decides
    assert offsets[-1] > 200


@pytest.mark.parametrize("most", [3, DRAWS])
def test_each_id_of_the_tail_has_its_share_of_the_draws_on_average(most: int) -> None:
    """Over a fine grid of shifts, for a number rounded down and one rounded up: the error of a share is of the order of
    the grid's step."""
    grid, row = 4000, _logits(1, 60)
    shifts = (np.arange(grid) + 0.5) / grid
    for up in (0.0, 1 - 1e-9):
        targets = _drawn(row.expand(grid, -1), np.stack([shifts, np.full(grid, up)], 1), kept_draws=most)
        (number,) = set(targets.draw_counts.tolist())
        tail = _tail(row[0], targets.ids[0])
        assert number == min(math.floor(DRAWS * tail.sum() + up), most)
        shares = np.bincount(targets.draw_ids, minlength=60) / targets.draw_ids.size
        np.testing.assert_allclose(shares, tail / tail.sum(), atol=2 / grid)


def test_the_mean_number_of_draws_is_d_times_the_mass_of_the_tail() -> None:
    grid, logits = 1000, torch.cat([_logits(3, 60), 6 * _logits(3, 60)])
    ups = (np.arange(grid) + 0.5) / grid
    for row in logits:
        targets = _drawn(row.expand(grid, -1), np.stack([np.full(grid, 0.3), ups], 1))
        wanted = DRAWS * _tail(row, targets.ids[0]).sum()
        assert set(targets.draw_counts.tolist()) <= {math.floor(wanted), math.ceil(wanted)}
        assert targets.draw_counts.mean() == pytest.approx(wanted, abs=2 / grid)


def test_an_id_of_the_tail_is_drawn_as_often_as_its_mass_requires_but_for_rounding() -> None:
    logits, uniforms = _logits(80, 30), np.random.default_rng(1).random((80, 2))
    targets = _drawn(logits, uniforms, top_k=1)
    offsets = targets.draw_offsets
    for n in range(80):
        tail, drawn = _tail(logits[n], targets.ids[n]), targets.draw_ids[offsets[n] : offsets[n + 1]]
        expected = tail / tail.sum() * drawn.size
        found = np.bincount(drawn, minlength=30)
        assert (np.abs(found - expected) < 1).all()


def test_a_tail_without_mass_has_no_draws() -> None:
    uniforms = np.full((3, 2), 1 - 1e-12)
    assert _drawn(_logits(3, 8), uniforms, top_k=8).draw_ids.size == 0
    certain = torch.zeros(3, 200)
    certain[:, 7] = 200.0
    assert _drawn(certain, uniforms).draw_ids.size == 0  # a float32 has no number for exp(-200)
    certain[:, 7] = 10.0
    assert _drawn(certain, uniforms).draw_counts.tolist() == [1, 1, 1]


def test_systematic_draws_do_not_change_with_batching() -> None:
    logits, positions = _logits(9, 3000), np.array([0, 1, 2, 5, 6, 7, 30, 31, 32])
    uniforms = draw_uniforms(positions, draws=uniform_count(DRAWS, draw_method="systematic"), seed=3, sample_id="a")
    alone = [_drawn(logits[n : n + 1], uniforms[n : n + 1]).draw_ids for n in range(9)]
    np.testing.assert_array_equal(_drawn(logits, uniforms).draw_ids, np.concatenate(alone))


def test_two_uniforms_place_all_systematic_draws() -> None:
    assert [uniform_count(draws, draw_method="systematic") for draws in (0, 1, 64)] == [0, 2, 2]
    assert [uniform_count(draws, draw_method="iid") for draws in (0, 1, 64)] == [0, 1, 64]
