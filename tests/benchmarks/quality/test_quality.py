"""The quality benchmark's records: which runs are missing, and what a share is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.plan import DENSE, PLAIN, SIDES, Run, found, missing, shares


def test_a_second_start_trains_only_the_missing_runs(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    everything = list(missing(SIDES, seeds=2, teachers=["flat", "sharp"], done=found(log)))
    assert len({run for run, _ in everything}) == len(everything) == 2 * 2 * len(SIDES)
    done = [run for run, _ in everything][::3]
    log.write_text("".join(json.dumps({**vars(run), "kl": 0.5, "seconds": 1.0}) + "\n" for run in done))
    left = [run for run, _ in missing(SIDES, seeds=2, teachers=["flat", "sharp"], done=found(log))]
    assert left == [run for run, _ in everything if run not in done]


def test_a_share_is_0_for_plain_fine_tuning_and_1_for_dense_taid_at_every_seed() -> None:
    kls = {
        Run("flat", 0, PLAIN.name): 1.4,
        Run("flat", 1, PLAIN.name): 1.2,
        Run("flat", 0, DENSE.name): 1.0,
        Run("flat", 1, DENSE.name): 1.0,
        Run("flat", 0, "K=16, D=64"): 1.1,
        Run("flat", 1, "K=16, D=64"): 1.0,
    }
    sides = [side for side in SIDES if side.name in {run.side for run in kls}]
    of_sides = shares(lambda side: [kls[Run("flat", seed, side)] for seed in range(2)], sides)
    assert of_sides[PLAIN.name] == [0, 0]
    assert of_sides[DENSE.name] == [1, 1]
    assert of_sides["K=16, D=64"] == pytest.approx([0.75, 1])
