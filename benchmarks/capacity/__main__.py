"""Teachers of growing size for one student: which loss gains from a larger teacher?

Text: Python's standard library, split by module. Teachers have about 1, 3, 10 and 30 times the student's parameters and
read the same text; each is captured once, with K = 128 and draws. Students learn from the caches by
`coldstill.train`, in the two settings of the paper (arXiv 2501.16937): from random weights on pieces of modules, and
from a pre-trained student on pairs of a function's signature and its body.

Each loss takes the learning rate with the lowest validation cross-entropy, chosen with the 10x teacher and the first
seed. With these, the validation part also shows other first values of TAID's t, and more passes. In long runs, of four
passes, the teacher has read five times as much, and learning rates are chosen again. The test part gives
the cross-entropy to the text, KL(teacher || student), masses, and what the student writes. A finished run is a line
of OUTPUT/runs.jsonl.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.capacity.plan import (
    FULL,
    LONG_LOSSES,
    LONG_PASSES,
    LOSSES,
    QUICK,
    SETTINGS,
    Done,
    Run,
    Size,
    chosen_rate,
    first_of_study,
    long_runs,
    planned,
    read,
    seconds_of_a_pass,
    study,
)
from benchmarks.common.command import add_folders, is_quick, new_parser, set_threads
from benchmarks.common.report import finish
from benchmarks.common.run_log import append, claim

if TYPE_CHECKING:
    from benchmarks.capacity.runs import Bench

LOG = "runs.jsonl"
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing runs, print the tables, and store what there is."""
    parser = new_parser(
        "capacity",
        __doc__,
        make="bench-capacity OUTPUT=DIR DRY_RUN=1",
        takes="about three hours on one core",
        quick="two weak teachers, one rate, one seed",
        result="capacity",
    )
    add_folders(parser, report=True, dry_run=True)
    parser.add_argument("--minutes", type=float, help="stop before the run that would end later, and report")
    options, quick = parser.parse_args(arguments), is_quick()
    began, size, output = time.monotonic(), QUICK if quick else FULL, options.output.resolve()
    log = output / LOG
    if options.dry_run:
        show_plan(size, read(log))
        return
    kept = {name: value for name, value in vars(size).items() if name != "seeds"}
    claim(output, benchmark="capacity", **kept)
    from benchmarks.capacity.runs import Bench

    set_threads()
    bench = Bench(output, size)
    if not options.report:
        bench.prepare()
        done = read(log)
        while run := next((run for run, final in planned(size, done) if final and run not in done), None):
            used = time.monotonic() - began
            if options.minutes is not None and used + run.passes * seconds_of_a_pass(done) > 60 * options.minutes:
                break
            done[run] = bench.run(run)
            append(log, done[run])
    report(bench, read(log), quick=quick)


def show_plan(size: Size, done: Done) -> None:
    """Print how many runs of each setting and seed are planned and done, and the time of the others."""
    table = Table("setting", "seed", "planned", "done", title="planned runs")
    runs = [run for run, _ in planned(size, done)]
    for setting in SETTINGS:
        for seed in range(size.seeds):
            of_seed = [run for run in runs if (run.setting, run.seed) == (setting, seed)]
            table.add_row(setting, str(seed), str(len(of_seed)), str(sum(run in done for run in of_seed)))
    Console().print(table)
    left = [run for run in runs if run not in done]
    minutes = sum(run.passes for run in left) * seconds_of_a_pass(done) / 60
    print(f"{len(left)} runs left, {minutes:.0f} minutes, beside an hour for teachers and caches")


def report(bench: Bench, done: Done, *, quick: bool) -> None:
    """Print the tables and store the finished runs."""
    size, plan = bench.size, {run for run, _ in planned(bench.size, done)}
    figures: dict[str, Any] = {
        "runs": {"done": sum(run in done for run in plan), "planned": len(plan)},
        "facts": bench.facts(),
        "settings": json.loads(json.dumps(vars(size))),
        "before": {setting: bench.before(setting) for setting in SETTINGS},
        "students": {},
        "long": {},
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
        figures["long"][setting] = _long_figures(setting, size, done)
    studied = [*study(size, done), *((run, True) for run in first_of_study(size, done))]
    table = Table("setting", "loss", "passes", "validation CE", "validation KL", title="study of TAID, validation part")
    for run in sorted({run for run, _ in studied} & done.keys(), key=lambda run: (run.setting, run.passes, run.loss)):
        of = done[run]["validation"]
        table.add_row(run.setting, run.loss, str(run.passes), f"{of['cross_entropy']:.4f}", f"{of['kl']:.4f}")
        figures["study"].append({**vars(run), **of})
    Console(width=150).print(table)
    finish("capacity", {**figures, "log": list(done.values())}, command="make bench-capacity", quick=quick)


def _long_figures(setting: str, size: Size, done: Done) -> dict[str, Any]:
    """Figures of the long runs of each loss, by seed."""
    title = f"{setting}, {size.better_teacher}, {LONG_PASSES} passes, test part"
    table = Table("loss", "rate", "seeds", *COLUMNS.values(), title=title)
    of_losses: dict[str, Any] = {}
    for loss in LONG_LOSSES:
        rate, all_tried = chosen_rate(setting, loss, size, done, is_long=True)
        records = [done[run] for run, _ in long_runs(setting, size, done) if run.loss == loss and run in done]
        if records:
            values = {name: [record["test"][name] for record in records] for name in records[0]["test"]}
            of_losses[loss] = {"rate": rate, "all_rates_tried": all_tried, "test": values}
            means = (f"{statistics.mean(values[name]):.4f}" for name in COLUMNS)
            table.add_row(loss, f"{rate:g}", str(len(records)), *means)
    Console(width=150).print(table)
    return of_losses


if __name__ == "__main__":
    main()
