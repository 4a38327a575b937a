"""Quality of students trained from caches of several sizes, compared with dense TAID.

    python -m benchmarks.quality DEMO OUTPUT      DEMO: the output folder of a finished `coldstill demo`
    QUICK=1 ...                                   one teacher, one seed, a fifth of the rows; nothing is stored

There are two teachers: the demo's, which is flat, and the same model with its logits divided by .512, which is as sharp
as a large one. There are three seeds for the order of the rows. Every side trains the same student on the same rows and
steps:

* plain fine-tuning;
* forward KL and TAID with the teacher in memory;
* TAID from a cache of K = 8, 16, 32 ids and D = 0, 32, 64 draws, of which a position keeps at most 32;
* TAID from K = 16 and 256 draws, all kept, which shows how much of a gap is noise of the draws;
* TAID from K = 16 with the top K renormalized, as in other tools.

Caches are real captures, read from their shards, so the figures include the loss of storage. Losses are the trainer's.

Prints held-out KL(teacher || student) over the whole vocabulary, and each side's share of dense TAID's gain over plain
fine-tuning. Each finished run is written to OUTPUT/runs.jsonl; a second start trains the missing runs only.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.run_log import append, lines_of
from benchmarks.quality.plan import QUICK_SIDES, SIDES, TEACHERS, Run, found, missing, shares
from benchmarks.quality.runs import Bench, Side


def main() -> None:
    """Train the missing runs, print the table, and store a full run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="output folder of a finished `coldstill demo`")
    parser.add_argument("output", type=Path, help="folder for captures and the log of runs; a second start resumes")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    teachers, sides, seeds = (["as trained"], QUICK_SIDES, 1) if quick else (list(TEACHERS), SIDES, 3)
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "runs.jsonl"
    todo = list(missing(sides, seeds=seeds, teachers=teachers, done=found(log)))
    benches: dict[str, Bench] = {}
    for run, side in tqdm(todo, desc="runs"):
        if run.teacher not in benches:
            folder = options.output / run.teacher.replace(" ", "_")
            benches[run.teacher] = Bench(options.demo, folder, divisor=TEACHERS[run.teacher], quick=quick)
        figures = benches[run.teacher].run(side, seed=run.seed)
        append(log, {**vars(run), **figures})
    _report(found(log), sides, seeds=seeds, teachers=teachers, quick=quick, log=log)


def _report(
    kls: dict[Run, float], sides: list[Side], *, seeds: int, teachers: list[str], quick: bool, log: Path
) -> None:
    from benchmarks.common.report import finish

    figures: dict[str, Any] = {"share_of_dense_gain": {}, "kl": {}}
    for teacher in teachers:

        def kl(side: str, teacher: str = teacher) -> list[float]:
            return [kls[Run(teacher, seed, side)] for seed in range(seeds)]

        of_sides = shares(kl, sides)
        table = Table("side", "held-out KL", "share", "lowest", "highest", title=f"teacher {teacher}")
        for side in sides:
            values = of_sides[side.name]
            columns = (statistics.mean(values), min(values), max(values))
            table.add_row(side.name, f"{statistics.mean(kl(side.name)):.4f}", *(f"{value:.3f}" for value in columns))
        Console().print(table)
        figures["share_of_dense_gain"][teacher] = {n: round(statistics.mean(v), 4) for n, v in of_sides.items()}
        figures["kl"][teacher] = {side.name: [round(value, 5) for value in kl(side.name)] for side in sides}
    figures["log"] = lines_of(log)
    finish("quality", figures, command="make bench-quality DEMO=DIR", quick=quick)


if __name__ == "__main__":
    main()
