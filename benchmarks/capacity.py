"""Teachers of growing size for one student: which loss gains from a larger teacher?

    python -m benchmarks.capacity OUTPUT --dry-run     the planned runs and their time, from those that are done
    python -m benchmarks.capacity OUTPUT               a second start resumes
    python -m benchmarks.capacity OUTPUT --minutes 40  stops before the run that would end later
    QUICK=1 ...                                        two weak teachers, one rate, one seed; nothing is stored

Text: Python's standard library, split by module. Teachers have about 1, 3, 10 and 30 times the student's parameters and
read the same text; each is captured once, with K = 128 and draws. Students learn from the caches by
`coldstill.train`, in the two settings of the paper (arXiv 2501.16937): from random weights on pieces of modules, and
from a pre-trained student on pairs of a function's signature and its body.

Each loss takes the learning rate with the lowest validation cross-entropy, chosen with the 10x teacher and the first
seed. With these, the validation part also shows other first values of TAID's t, and more passes. The test part gives
the cross-entropy to the text, KL(teacher || student), masses, and what the student writes. A finished run is a line
of OUTPUT/runs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.capacity_runs import LOSSES, SETTINGS, STUDIED, Bench, Run, Size
from benchmarks.run_log import append, lines_of

FULL = Size(
    teacher_tokens=500_000,
    student_tokens=200_000,
    rows={"pre-training": 1200, "instruction pairs": 1200},
    rows_per_step={"pre-training": 4, "instruction pairs": 8},
    rates={"pre-training": (4e-3, 8e-3, 2e-3, 1e-3), "instruction pairs": (2e-3, 4e-3, 1e-3, 8e-3)},
    held_out=60,
    teachers=("1x", "3x", "10x", "30x"),
    main_teacher="10x",
    seeds=3,
)
QUICK = Size(
    teacher_tokens=40_000,
    student_tokens=20_000,
    rows={"pre-training": 60, "instruction pairs": 60},
    rows_per_step={"pre-training": 4, "instruction pairs": 8},
    rates={"pre-training": (4e-3,), "instruction pairs": (2e-3,)},
    held_out=6,
    teachers=("1x", "3x"),
    main_teacher="3x",
    seeds=1,
)
LOG = "runs.jsonl"
SECONDS_OF_A_RUN = 18.5
"""On one core beside other programs: the mean of the 135 runs of `results/capacity_2_cores.json`."""
COLUMNS = {
    "cross_entropy": "CE to text",
    "kl": "KL",
    "entropy": "entropy",
    "teacher_mass_on_head": "teacher on head",
    "head_mass": "on its head",
    "last_fifth_mass": "on its tail",
    "distinct_bigrams": "distinct",
    "teacher_log_prob": "log p of own",
}
"""Figures of the table and their short names."""
RUN_KEYS = tuple(field.name for field in fields(Run))
STUDY_PASSES = (1, 4)
Done = dict[Run, dict[str, Any]]


def main() -> None:
    """Run the missing runs, print the tables, and store what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for models, captures and the log; a second start resumes")
    parser.add_argument("--dry-run", action="store_true", help="print the planned runs, and train nothing")
    parser.add_argument("--report", action="store_true", help="report the finished runs, and train nothing")
    parser.add_argument("--minutes", type=float, help="stop before the run that would end later, and report")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    began, size, output = time.monotonic(), QUICK if quick else FULL, options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    log, bench = output / LOG, Bench(output, size)
    if options.dry_run:
        show_plan(size, read(log))
        return
    if not options.report:
        bench.prepare()
        done = read(log)
        while run := next((run for run, final in planned(size, done) if final and run not in done), None):
            used = time.monotonic() - began
            if options.minutes is not None and used + seconds_of_a_run(done) > 60 * options.minutes:
                break
            done[run] = bench.run(run)
            append(log, done[run])
    report(bench, read(log), quick=quick)


def read(log: Path) -> Done:
    """The records of the finished runs, by run."""
    return {Run(**{name: record[name] for name in RUN_KEYS if name in record}): record for record in lines_of(log)}


def chosen_rate(setting: str, loss: str, size: Size, done: Done) -> tuple[float, bool]:
    """The best learning rate of those tried, the first one if none was, and whether all were tried."""
    tried = {rate: done.get(Run(setting, loss, size.main_teacher, rate, 0)) for rate in size.rates[setting]}
    values = {rate: record["validation"]["cross_entropy"] for rate, record in tried.items() if record}
    best = min(values, key=lambda rate: values[rate]) if values else size.rates[setting][0]
    return best, len(values) == len(tried)


def planned(size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    """Every run in the order of its value, and whether its learning rate is final.

    Both settings: the learning rates, then the other teachers. Then the study of TAID, then other seeds.
    """
    for setting in SETTINGS:
        for rate in size.rates[setting]:
            for loss in LOSSES:
                yield Run(setting, loss, size.main_teacher, rate, 0), True
        yield from _with_chosen_rates(setting, 0, size, done)
    yield from study(size, done)
    for setting in reversed(SETTINGS):  # the shorter runs first
        for seed in range(1, size.seeds):
            yield from _with_chosen_rates(setting, seed, size, done)


def study(size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    """Where TAID's advantage begins: other first values of t, and more passes, for the main teacher and one seed."""
    for setting in SETTINGS if size.seeds > 1 else ():
        for passes in STUDY_PASSES:
            for loss in ("forward KL", "TAID", *STUDIED):
                rate, is_final = chosen_rate(setting, "TAID" if loss in STUDIED else loss, size, done)
                if passes > 1 or loss in STUDIED:
                    yield Run(setting, loss, size.main_teacher, rate, 0, passes), is_final


def _with_chosen_rates(setting: str, seed: int, size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    for teacher in (size.main_teacher, *(name for name in size.teachers if name != size.main_teacher)):
        for loss in LOSSES:
            if teacher == size.main_teacher and seed == 0:
                continue  # was tried with every rate
            if teacher == size.main_teacher or loss != "SFT":  # SFT has no teacher
                rate, is_final = chosen_rate(setting, loss, size, done)
                yield Run(setting, loss, teacher, rate, seed), is_final


def _first_of_study(size: Size, done: Done) -> list[Run]:
    """The runs of the study that are also part of the main comparison."""
    losses = ("forward KL", "TAID")
    return [
        Run(setting, loss, size.main_teacher, chosen_rate(setting, loss, size, done)[0], 0)
        for setting in SETTINGS
        for loss in losses
    ]


def seconds_of_a_run(done: Done) -> float:
    """Mean time of the finished runs; without any, that of the stored result."""
    return statistics.mean(record["seconds"] for record in done.values()) if done else SECONDS_OF_A_RUN


def show_plan(size: Size, done: Done) -> None:
    """Print how many runs of each setting and seed are planned and done, and the time of the others."""
    table = Table("setting", "seed", "planned", "done", title="planned runs")
    runs = [run for run, _ in planned(size, done)]
    for setting in SETTINGS:
        for seed in range(size.seeds):
            of_seed = [run for run in runs if (run.setting, run.seed) == (setting, seed)]
            table.add_row(setting, str(seed), str(len(of_seed)), str(sum(run in done for run in of_seed)))
    Console().print(table)
    left = sum(run not in done for run in runs)
    print(
        f"{left} runs left, {left * seconds_of_a_run(done) / 60:.0f} minutes, beside 20 minutes for teachers and caches"
    )


def report(bench: Bench, done: Done, *, quick: bool) -> None:
    """Print the tables and store the finished runs."""
    from benchmarks.report import finish

    size, plan = bench.size, {run for run, _ in planned(bench.size, done)}
    figures: dict[str, Any] = {
        "runs": {"done": sum(run in done for run in plan), "planned": len(plan)},
        "facts": bench.facts(),
        "settings": json.loads(json.dumps(vars(size))),
        "before": {setting: bench.before(setting) for setting in SETTINGS},
        "students": {},
        "study": [],
    }
    for setting in SETTINGS:
        table = Table("loss", "teacher", "rate", "seeds", *COLUMNS.values(), title=f"{setting}, test part")
        of_losses: dict[str, Any] = {}
        for loss in LOSSES:
            rate, all_tried = chosen_rate(setting, loss, size, done)
            for teacher in size.teachers:
                runs = [Run(setting, loss, teacher, rate, seed) for seed in range(size.seeds)]
                records = [done[run] for run in runs if run in done]
                if not records:
                    continue
                values = {name: [record["test"][name] for record in records] for name in records[0]["test"]}
                of_losses.setdefault(loss, {"rate": rate, "all_rates_tried": all_tried, "teachers": {}})
                of_losses[loss]["teachers"][teacher] = values
                means = (f"{statistics.mean(values[name]):.4f}" for name in COLUMNS)
                table.add_row(loss, teacher, f"{rate:g}", str(len(records)), *means)
        Console(width=150).print(table)
        figures["students"][setting] = of_losses
    studied = [*study(size, done), *((run, True) for run in _first_of_study(size, done))]
    table = Table("setting", "loss", "passes", "validation CE", "validation KL", title="study of TAID, validation part")
    for run in sorted({run for run, _ in studied} & done.keys(), key=lambda run: (run.setting, run.passes, run.loss)):
        of = done[run]["validation"]
        table.add_row(run.setting, run.loss, str(run.passes), f"{of['cross_entropy']:.4f}", f"{of['kl']:.4f}")
        figures["study"].append({**vars(run), **of})
    Console(width=150).print(table)
    finish("capacity", {**figures, "log": list(done.values())}, command="make bench-capacity", quick=quick)


if __name__ == "__main__":
    main()
