"""The planned runs of a real pair with their time, from finished runs or from a short calibration."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.report import stored
from benchmarks.inputs.real_text import HEALING
from benchmarks.real_pair.plan import (
    CROSS_ENTROPY,
    DENSE,
    HELD_OUT,
    LOG,
    SIDES,
    TABLE_WIDTH,
    Done,
    Run,
    Size,
    is_measured,
    planned,
    read_log,
    run_of,
    settings,
)
from benchmarks.real_pair.runs import Bench
from benchmarks.real_pair.stored_runs import check_same
from coldstill.common.files import read_json, write_json

CALIBRATION_ROWS, CALIBRATION_STEPS = {"train": 12, "validation": 4, "test": 4, HEALING: 40}, 4


def show_plan(output: Path, size: Size, *, with_stored: bool) -> None:
    """Print each planned run and its time: that of finished runs of its kind, else from the calibration."""
    done = read_log(output / LOG)
    speeds = calibration(output, size)
    table = Table("run", "learning rate", "minutes", title="planned runs")
    total = speeds["prepare_s"] if not done else 0.0
    table.add_row("rows, students, capture, teacher", "", f"{speeds['prepare_s'] / 60:.1f}" if not done else "done")
    if with_stored:
        check_same("settings", settings(size), read_json(stored("real_pair")))
        done = {run_of(record): record for record in read_json(stored("real_pair"))["log"]} | done
    for run, side, final in planned(SIDES, size, done):
        seconds = expected_seconds(run, done, speeds, size)
        total += 0 if run in done else seconds
        rate = f"{run.rate:g}" if final else "of validation"
        minutes = "done" if run in done else f"{seconds / 60:.1f}"
        table.add_row(f"{run.student.name}, seed {run.seed}: {side.name}", rate, minutes)
    Console(width=TABLE_WIDTH).print(table)
    print(f"{total / 3600:.1f} hours in one process; two processes on two cores take about half of it")


def expected_seconds(run: Run, done: Done, speeds: dict[str, Any], size: Size) -> float:
    """Mean time of the finished runs with this student and kind of side, else an estimate from the calibration."""
    of_kind = [
        record["seconds"]
        for other, record in done.items()
        if is_measured(record)
        and (other.layers, other.steps) == (run.layers, run.steps)
        and (other.side == DENSE.name) == (run.side == DENSE.name)
    ]
    if of_kind:
        return statistics.mean(of_kind)
    kind = "dense" if run.side == DENSE.name else "cached"
    held_out = sum(size.rows[part] for part in HELD_OUT)
    per_step = speeds["seconds_per_step"][f"{run.layers} layers, {kind}"]
    return float(run.steps * per_step + held_out * speeds["measure_seconds_per_row"] + speeds["load_s"])


def calibration(output: Path, size: Size) -> dict[str, Any]:
    """Measure the speed of capture, training and measurement on a few rows, once: OUTPUT/calibration.json keeps it."""
    path = output / "calibration.json"
    if path.exists():
        return dict(read_json(path))
    few = replace(size, rows=CALIBRATION_ROWS, steps=CALIBRATION_STEPS)
    bench = Bench(output / "calibration", few)
    began = time.monotonic()
    bench.prepare()
    prepared = time.monotonic() - began
    found: dict[str, Any] = {"seconds_per_step": {}}
    for layers in {student.layers for student in size.students}:
        for kind, side in (("cached", CROSS_ENTROPY), ("dense", DENSE)):
            record = bench.run(Run(layers, False, side.name, size.rates[0], 0, CALIBRATION_STEPS), side)
            found["seconds_per_step"][f"{layers} layers, {kind}"] = record["wall_s"] / CALIBRATION_STEPS
            found["load_s"] = record["seconds"] - record["wall_s"] - record["measure_s"]
            found["measure_seconds_per_row"] = record["measure_s"] / sum(CALIBRATION_ROWS[part] for part in HELD_OUT)
    summary = read_json(bench.capture_summary)
    scored = size.rows["train"] / CALIBRATION_ROWS["train"] * summary["tokens"] / summary["tokens_per_s"]
    # The engine's start is in the measured time. A row of hidden states costs at most what measuring one costs.
    found["prepare_s"] = prepared + scored + sum(size.rows.values()) * found["measure_seconds_per_row"]
    write_json(path, found)
    return found
