"""Does more data average the noise of draws out? The ways of drawing that matter, trained on 300,000 targets.

    python -m benchmarks.draws_long DEMO OUTPUT        DEMO: the output folder of a finished `coldstill demo`
    QUICK=1 ...                                        one teacher, three sides, few targets; nothing is stored

Models, captures, losses and figures are those of part 2 of `benchmarks.draws`, whose runs have 54,000 targets. The rows
are all pairs of the demo's distillation part, in one random order per epoch; a second epoch gives what is missing. Only
the teacher, the student, the tokenizer and the text of DEMO are read. Each finished run is a line of OUTPUT/runs.jsonl;
a second start trains the missing runs only, and `--report` stores the finished ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.report import finish
from benchmarks.common.run_log import append, lines_of
from benchmarks.draws.plan import shares_of
from benchmarks.quality.plan import DENSE, PLAIN, TEACHERS
from benchmarks.quality.runs import Bench, Cache, Side
from coldstill.common.files import new_folder
from coldstill.demo.text import write_text

TARGETS, QUICK_TARGETS = 300_000, 2_000
QUICK_ROWS = 64
SEEDS = 3
DEFAULT = Side("K=8, D=64, systematic, kept 64", Cache(8, 64, 64, "systematic"))
SIDES = [
    PLAIN,
    DENSE,
    DEFAULT,
    Side("K=16, D=64, iid, kept 32", Cache(16, 64, 32, "iid")),
    Side("K=4, D=64, systematic, kept 64", Cache(4, 64, 64, "systematic")),
    Side("K=8, D=64, systematic+lp, kept 64", Cache(8, 64, 64, "systematic", logprobs=True)),
]
"""Named as in `draws/plan.py`, in the order of what is most wanted."""
QUICK_SIDES = SIDES[:3]


def planned(*, quick: bool) -> Iterator[tuple[str, int, Side]]:
    """Teacher, seed and side of each run. The flat teacher comes first: it is the one with noise to average out."""
    seeds, teachers = (1, list(TEACHERS)[:1]) if quick else (SEEDS, list(TEACHERS))
    for teacher in teachers:
        for seed in range(seeds):
            for side in QUICK_SIDES if quick else SIDES:
                yield teacher, seed, side


def key(line: dict[str, Any]) -> tuple[str, int, str]:
    """Teacher, seed and side of a line of the log."""
    return line["teacher"], line["seed"], line["side"]


def all_pairs(output: Path, *, limit: int | None) -> Path:
    """The file with all pairs of the distillation part, or the first `limit`, which is written if it is missing."""
    folder = output / "text"
    if not folder.exists():
        with new_folder(folder) as beside:
            write_text(beside, distill_rows=limit)
    return folder / "distill.pairs.jsonl"


def train(demo: Path, output: Path, log: Path, *, quick: bool) -> None:
    """Append the missing runs to the log."""
    rows = all_pairs(output, limit=QUICK_ROWS if quick else None)
    targets = QUICK_TARGETS if quick else TARGETS
    done = {key(line) for line in lines_of(log) if "side" in line}
    benches: dict[str, Bench] = {}
    for teacher, seed, side in tqdm([run for run in planned(quick=quick) if (run[0], run[1], run[2].name) not in done]):
        if teacher not in benches:
            folder = output / teacher.replace(" ", "_")
            benches[teacher] = Bench(demo, folder, divisor=TEACHERS[teacher], quick=quick, rows=rows, targets=targets)
        append(log, {"teacher": teacher, "seed": seed, "side": side.name, **benches[teacher].run(side, seed=seed)})


def report(lines: list[dict[str, Any]], *, quick: bool) -> dict[str, Any]:
    """What is stored of the log: shares of the runs whose teacher and seed have both ends, all runs, and the plan."""
    runs = [line for line in lines if "side" in line]
    wanted = {(teacher, seed, side.name) for teacher, seed, side in planned(quick=quick)}
    return {
        "runs_done": len(wanted & set(map(key, runs))),
        "runs_planned": len(wanted),
        "share_of_dense_gain": shares_of(runs),
        "runs": runs,
    }


def main() -> None:
    """Train what is missing, print the shares, and store a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="output folder of a finished `coldstill demo`")
    parser.add_argument("output", type=Path, help="folder for captures and the log; a second start resumes")
    parser.add_argument("--report", action="store_true", help="store what is finished, without training more")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "runs.jsonl"
    if not options.report:
        train(options.demo, options.output, log, quick=quick)
    figures = report(lines_of(log), quick=quick)
    for teacher, sides in figures["share_of_dense_gain"].items():
        table = Table("side", "share of dense TAID's gain", "runs", title=f"teacher {teacher}")
        for side, values in sides.items():
            table.add_row(side, f"{statistics.mean(values):.4f}", str(len(values)))
        Console().print(table)
    finish("draws_300k", figures, command="make bench-draws-long DEMO=DIR", quick=quick)


if __name__ == "__main__":
    main()
