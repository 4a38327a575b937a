"""Plots of stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import report
from benchmarks.common.report import stored
from benchmarks.plots import draw_draws, draw_real_pair, title


@pytest.fixture
def result() -> dict[str, Any]:
    def side(*kls: float) -> dict[str, Any]:
        return {"kl": list(kls), "top1_agreement": [0.4 for _ in kls]}

    return {
        "runs": {"done": 3, "planned": 48},
        "facts": {"teacher": "a teacher"},
        "before": {"8 layers, healed": {"kl": 10.0, "top1_agreement": 0.0}},
        "sides": {"8 layers, healed": {"cross-entropy": side(2.0, 2.1), "dense TAID": side(1.5)}},
    }


def test_a_plot_of_unfinished_results_says_so(result: dict[str, Any], tmp_path: Path) -> None:
    assert title(result) == "a teacher, test part; 3 of 48 planned runs"
    assert title({**result, "runs": {"done": 48, "planned": 48}}) == "a teacher, test part"
    draw_real_pair(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_newest_result_of_a_name_is_taken_and_none_of_a_longer_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    dates = {"a_2_cores": "2026-01-02", "a_64_cores": "2026-01-03", "a_long_2_cores": "2026-01-04"}
    for name, date in dates.items():
        (tmp_path / f"{name}.json").write_text(f'{{"date": "{date}"}}')
    assert stored("a") == tmp_path / "a_64_cores.json"
    with pytest.raises(FileNotFoundError, match="no b_"):
        stored("b")


def test_the_plot_of_draws_shows_every_way_whose_bytes_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = "K=8, D=64, systematic, kept 64"
    line = {"top_k": 8, "draws": "systematic", "bytes": 50.0}
    (tmp_path / "draws_bytes_2_cores.json").write_text(json.dumps({"date": "", "flat": [line], "sharp": [line]}))
    longer = {"as trained": {way: [0.98], "dense TAID": [1.0]}}
    (tmp_path / "draws_300k_2_cores.json").write_text(json.dumps({"date": "", "share_of_dense_gain": longer}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    shares = {"as trained": {way: [0.9, 0.95], "dense TAID": [1.0, 1.0]}, "sharpened": {way: [1.0, 1.01]}}
    draw_draws({"share_of_dense_gain": shares}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
