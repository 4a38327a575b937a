"""The capacity benchmark: which runs are missing, which learning rate a loss takes, and the whole on a toy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.capacity.plan import (
    FULL,
    LONG_LOSSES,
    LONG_PASSES,
    LOSSES,
    SETTINGS,
    STUDENT,
    TEACHERS,
    Done,
    Run,
    chosen_rate,
    long_runs,
    planned,
    read,
)
from benchmarks.common.run_log import append
from benchmarks.plots import draw_capacity
from coldstill.demo.models import new_model, parameter_count


def _record(run: Run, *, validation: float = 1.0, test: float = 1.0) -> dict[str, Any]:
    return {**vars(run), "validation": {"cross_entropy": validation}, "test": {"cross_entropy": test}, "seconds": 1.0}


def _all_done() -> Done:
    done: Done = {}
    while run := next((run for run, final in planned(FULL, done) if final and run not in done), None):
        done[run] = _record(run)
    return done


@pytest.mark.parametrize(("name", "wanted"), [("1x", 1), ("3x", 3), ("10x", 10), ("30x", 30)])
def test_a_teacher_has_as_many_times_the_parameters_of_the_student_as_its_name_says(name: str, wanted: int) -> None:
    ratio = parameter_count(new_model(TEACHERS[name], vocabulary=2048)) / parameter_count(
        new_model(STUDENT, vocabulary=2048)
    )
    assert wanted * 0.8 <= ratio <= wanted * 1.25


def test_every_loss_meets_every_teacher_in_both_settings_with_every_seed_and_no_run_is_planned_twice() -> None:
    done = _all_done()
    plan = [run for run, _ in planned(FULL, done)]
    assert len(plan) == len(set(plan)) == len(done)
    for setting in SETTINGS:
        for loss in LOSSES:
            rate, all_tried = chosen_rate(setting, loss, FULL, done)
            assert all_tried
            teachers = [FULL.main_teacher] if loss == "SFT" else FULL.teachers
            wanted = {Run(setting, loss, name, rate, seed) for name in teachers for seed in range(FULL.seeds)}
            assert wanted <= done.keys()


def test_the_learning_rate_is_chosen_on_the_validation_part_alone() -> None:
    setting, loss = SETTINGS[0], "TAID"
    rates = FULL.rates[setting]
    runs = [Run(setting, loss, FULL.main_teacher, rate, 0) for rate in rates]
    values = [(1.2, 0.5), (1.1, 0.9), (1.3, 0.4), (1.4, 0.3)]
    done = {run: _record(run, validation=of[0], test=of[1]) for run, of in zip(runs, values, strict=True)}
    assert chosen_rate(setting, loss, FULL, done) == (rates[1], True)
    del done[runs[1]]
    assert chosen_rate(setting, loss, FULL, done) == (rates[0], False)
    later = [(run, final) for run, final in planned(FULL, done) if run.loss == loss and run.teacher == "30x"]
    assert later[0] == (Run(setting, loss, "30x", rates[0], 0), False)


def test_long_runs_take_learning_rates_of_their_own_and_all_seeds() -> None:
    setting, loss = SETTINGS[0], "forward KL"
    done, rates = _all_done(), FULL.long_rates[SETTINGS[0]]
    best = Run(setting, loss, FULL.better_teacher, rates[2], 0, LONG_PASSES)
    done[best] = _record(best, validation=0.5, test=2.0)
    assert chosen_rate(setting, loss, FULL, done)[0] == FULL.rates[setting][0]
    runs = [run for run, is_final in long_runs(setting, FULL, done) if run.loss == loss and is_final]
    assert [(run.teacher, run.rate, run.seed) for run in runs] == [
        (FULL.better_teacher, rates[2], seed) for seed in range(FULL.seeds)
    ]
    assert {run.loss for run, _ in long_runs(setting, FULL, done)} == set(LONG_LOSSES)


def test_a_torn_line_costs_one_run(tmp_path: Path) -> None:
    first, second = (Run(SETTINGS[0], loss, "10x", 1e-3, 0) for loss in ("SFT", "TAID"))
    log = tmp_path / "runs.jsonl"
    assert read(log) == {}
    log.write_text(json.dumps(_record(first)) + '\n{"setting": "pre', encoding="utf-8")
    append(log, _record(second))
    assert list(read(log)) == [first, second]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_quick_benchmark_trains_every_side_and_a_second_start_trains_none(tmp_path: Path) -> None:
    def figures() -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.capacity", str(tmp_path)]
        ended = subprocess.run(command, env={**os.environ, "QUICK": "1"}, check=True, capture_output=True, text=True)
        return json.loads(ended.stdout.splitlines()[-1])

    first = figures()
    assert first["runs"]["done"] == first["runs"]["planned"] == 22 + len(SETTINGS) * len(LONG_LOSSES)
    assert len(first["study"]) == 4
    for setting in SETTINGS:
        assert first["long"][setting].keys() == set(LONG_LOSSES)
        of_losses = first["students"][setting]
        before = first["before"][setting]["kl"]
        for loss in set(LOSSES) - {"SFT"}:
            assert of_losses[loss]["teachers"]["3x"]["kl"][0] < before
    assert figures()["log"] == first["log"]
    draw_capacity(first, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
