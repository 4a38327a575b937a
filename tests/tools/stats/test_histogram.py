"""Histograms: every value in one bin, sums of histograms, percentiles."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import pytest

from coldstill.tools.stats.histogram import ENTROPY, LOGPROB, MASS, RANK, WHOLE, Histogram, Scale, Tally

SCALES = {"entropy": ENTROPY, "logprob": LOGPROB, "mass": MASS, "rank": RANK, "whole": WHOLE}


def values_for(scale: Scale, seed: int, count: int = 3000) -> np.ndarray:
    """Values all over a scale, with its edges among them; ranks are not above the last edge."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.uniform(scale.edges[0], scale.edges[-1], count), scale.edges[:-1]])
    values = np.concatenate([values, rng.uniform(scale.edges[0], scale.edges[min(40, scale.edges.size - 1)], count)])
    return np.floor(values) if scale.whole else values


def histogram_of(scale: Scale, values: np.ndarray, outside: int = 0) -> Histogram:
    tally = Tally(scale)
    tally.add(values, outside=outside)
    return tally.histogram()


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_edges_ascend_and_whole_numbers_have_whole_edges(scale: Scale) -> None:
    assert (np.diff(scale.edges) > 0).all()
    if scale.whole:
        assert (scale.edges == np.round(scale.edges)).all()


def test_scales_reach_as_far_as_the_format() -> None:
    assert ENTROPY.edges[-1] >= np.log(4097)
    assert (LOGPROB.edges[0], LOGPROB.edges[-1]) == (-60, 0)
    assert (MASS.edges[0], MASS.edges[-1]) == (0, 1)
    assert RANK.edges.tolist() == [1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025, 2049, 4097]
    assert WHOLE.edges[:257].tolist() == list(range(257))
    assert WHOLE.edges[-1] > 1 << 20
    assert (np.diff(WHOLE.edges[256:]) / WHOLE.edges[256:-1]).max() < 0.025


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_value_is_counted_once_in_its_bin(scale: Scale) -> None:
    values, edges = values_for(scale, 0), scale.edges.tolist()
    slow: dict[tuple[float, float], int] = {}
    for value in values.tolist():
        place = min(max(bisect_right(edges, value) - 1, 0), len(edges) - 2)
        slow[edges[place], edges[place + 1]] = slow.get((edges[place], edges[place + 1]), 0) + 1

    histogram = histogram_of(scale, values)

    assert {(item.start, item.stop): item.values for item in histogram.bins} == slow
    assert histogram.count == values.size
    assert histogram.mean == pytest.approx(values.mean())
    assert (histogram.least, histogram.most) == (values.min(), values.max())


def test_values_beyond_the_scale_are_in_its_last_bins() -> None:
    histogram = histogram_of(LOGPROB, np.array([-70.0, 0.0, 1e-7]))

    assert [(round(item.start, 1), item.values) for item in histogram.bins] == [(-60.0, 1), (-0.1, 2)]


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_sum_of_two_histograms_is_the_histogram_of_all_values(scale: Scale) -> None:
    one, other = values_for(scale, 1), values_for(scale, 2)

    both = histogram_of(scale, one, outside=2) + histogram_of(scale, other, outside=3)

    whole = histogram_of(scale, np.concatenate([one, other]), outside=5)
    assert both.bins == whole.bins
    assert both.total == pytest.approx(whole.total)
    assert (both.least, both.most, both.outside) == (whole.least, whole.most, 5)


def test_many_small_arrays_count_as_one_large_one() -> None:
    values = values_for(MASS, 3, count=60_000)
    tally = Tally(MASS)
    for part in np.array_split(values, 999):
        tally.add(part)

    assert tally.histogram().bins == histogram_of(MASS, values).bins


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_percentile_is_at_most_one_bin_off(scale: Scale, share: float) -> None:
    values = values_for(scale, 4)
    exact = float(np.quantile(values, share, method="inverted_cdf"))

    found = histogram_of(scale, values).quantile(share)

    assert found is not None
    places = np.searchsorted(scale.edges, [found, exact], side="right")
    assert abs(int(places[0]) - int(places[1])) <= 1
    assert values.min() <= found <= values.max()
    assert not scale.whole or found == round(found)


def test_where_all_values_are_equal_every_percentile_is_that_value() -> None:
    histogram = histogram_of(WHOLE, np.full(100, 4096))

    assert (histogram.mean, histogram.p01, histogram.p50, histogram.p99) == (4096, 4096, 4096, 4096)


def test_a_histogram_of_nothing_has_no_figures_and_adds_nothing() -> None:
    nothing, some = Tally(ENTROPY).histogram(), histogram_of(ENTROPY, np.array([1.0, 2.0]))

    assert (nothing.count, nothing.mean, nothing.p50, nothing.least) == (0, None, None, None)
    assert nothing + some == some + nothing == some


def test_a_histogram_survives_json() -> None:
    histogram = histogram_of(MASS, values_for(MASS, 5), outside=4)

    assert Histogram.model_validate_json(histogram.model_dump_json()) == histogram


def test_histograms_of_two_kinds_do_not_add() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        histogram_of(WHOLE, np.array([1])) + histogram_of(MASS, np.array([0.5]))
