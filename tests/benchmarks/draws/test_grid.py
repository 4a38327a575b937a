"""The runs of students by what a cache keeps: which are missing, and what a share is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.draws import long, plan, quality
from benchmarks.draws.grid import missing, shares_of
from benchmarks.draws.plan import DENSE, PLAIN, Run
from benchmarks.draws.quality import SIDES
from benchmarks.draws.tables import print_shares


def test_every_command_plans_each_run_once() -> None:
    planned = {"quality": quality.planned(quick=False), "draws": plan.runs(), "long": list(long.planned(quick=False))}
    for runs in planned.values():
        assert len({run.key for run in runs}) == len(runs)
    assert len(planned["quality"]) == 2 * 3 * len(SIDES)


def test_a_second_start_trains_only_the_missing_runs(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    runs = [Run(teacher, seed, side) for seed in range(2) for teacher in ("flat", "sharp") for side in SIDES]
    everything = list(missing(runs, log))
    assert everything == runs
    assert len({run.key for run in everything}) == len(everything) == 2 * 2 * len(SIDES)
    done = everything[::3]
    log.write_text("".join(json.dumps(_line(*run.key, kl=0.5)) + "\n" for run in done) + '{"noise": {}}\n')
    assert list(missing(runs, log)) == [run for run in everything if run not in done]


def test_a_share_is_0_for_plain_fine_tuning_and_1_for_dense_taid_at_every_seed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kls = {PLAIN.name: (1.4, 1.2), DENSE.name: (1.0, 1.0), "K=16, D=64": (1.1, 1.0)}
    runs = [_line("flat", seed, side, kl=kl) for side, of_seeds in kls.items() for seed, kl in enumerate(of_seeds)]
    of_sides = shares_of(runs)["flat"]
    assert of_sides[PLAIN.name] == [0, 0]
    assert of_sides[DENSE.name] == [1, 1]
    assert of_sides["K=16, D=64"] == pytest.approx([0.75, 1])
    print_shares(runs)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "K=16, D=64" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")[1:]] == ["2", "1.0500", "0.875", "0.750", "1.000"]


def _line(teacher: str, seed: int, side: str, *, kl: float) -> dict[str, Any]:
    return {"teacher": teacher, "seed": seed, "side": side, "kl": kl, "seconds": 1.0}
