"""Plots of stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.plots import draw_real_pair, title


@pytest.fixture
def result() -> dict[str, Any]:
    def side(*kls: float) -> dict[str, Any]:
        return {"kl": list(kls), "top1_agreement": [0.4 for _ in kls]}

    return {
        "runs": {"done": 3, "planned": 48},
        "facts": {"teacher": "a teacher"},
        "before": {"8": {"kl": 10.0, "top1_agreement": 0.0}},
        "sides": {"8": {"cross-entropy": side(2.0, 2.1), "dense TAID": side(1.5)}},
    }


def test_a_plot_of_unfinished_results_says_so(result: dict[str, Any], tmp_path: Path) -> None:
    assert title(result) == "a teacher, test part; 3 of 48 planned runs"
    assert title({**result, "runs": {"done": 48, "planned": 48}}) == "a teacher, test part"
    draw_real_pair(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
