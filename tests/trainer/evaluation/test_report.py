"""The expected calibration error against its definition, bin by bin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coldstill.trainer.evaluation.report import BINS, bin_sums, calibration_bins, expected_calibration_error
from tests.trainer.evaluation import reference


@pytest.mark.parametrize("count", [1, 7, 500])
def test_it_is_the_weighted_gap_of_the_bins(count: int) -> None:
    rng = np.random.default_rng(count)
    confidence, hits = rng.random(count), rng.random(count) < 0.5
    sums = bin_sums(torch.from_numpy(confidence), torch.from_numpy(hits.astype(float)))
    wanted = reference.expected_calibration_error(confidence.tolist(), hits.tolist())
    assert expected_calibration_error(sums) == pytest.approx(wanted, rel=1e-12)


def test_a_bin_holds_its_upper_edge_and_not_its_lower_one() -> None:
    edges = torch.arange(1, BINS + 1, dtype=torch.float64) / BINS
    assert bin_sums(edges, torch.zeros_like(edges))[0].tolist() == [1] * BINS
    assert bin_sums(edges[:-1] + 1e-9, torch.zeros(BINS - 1, dtype=torch.float64))[0].tolist() == [0] + [1] * 14


def test_sums_of_parts_add_up() -> None:
    rng = np.random.default_rng(1)
    confidence, hits = torch.from_numpy(rng.random(50)), torch.from_numpy((rng.random(50) < 0.3).astype(float))
    parts = bin_sums(confidence[:20], hits[:20]) + bin_sums(confidence[20:], hits[20:])
    torch.testing.assert_close(parts, bin_sums(confidence, hits))


def test_a_calibrated_student_has_none() -> None:
    confidence = torch.full((10,), 0.7, dtype=torch.float64)
    hits = torch.tensor([1.0] * 7 + [0.0] * 3, dtype=torch.float64)
    assert expected_calibration_error(bin_sums(confidence, hits)) == pytest.approx(0, abs=1e-15)


def test_an_empty_bin_has_no_means() -> None:
    sums = bin_sums(torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    bins = calibration_bins(sums)
    assert [one.targets for one in bins] == [0] * 7 + [1] + [0] * 7
    assert bins[7].accuracy == 1
    assert bins[0].accuracy is None
