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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.quality_runs import Bench, Cache, Side
from benchmarks.run_log import append, lines_of

TEACHERS = {"as trained": 1.0, "sharpened": 0.512}
"""Divisor of the teacher's logits."""
PLAIN, DENSE_KL, DENSE = Side("plain fine-tuning"), Side("dense forward KL"), Side("dense TAID")
CACHED = [Side(f"K={k}, D={d}", Cache(k, d)) for k in (8, 16, 32) for d in (0, 32, 64)]
MORE_DRAWS = Side("K=16, D=256, all kept", Cache(16, 256, kept_draws=256))
RENORMALIZED = Side("K=16, renormalised", Cache(16, 0), renormalize=True)
SIDES = [PLAIN, DENSE_KL, DENSE, *CACHED, MORE_DRAWS, RENORMALIZED]
QUICK_SIDES = [PLAIN, DENSE, Side("K=16, D=0", Cache(16, 0)), Side("K=16, D=64", Cache(16, 64))]


@dataclass(frozen=True)
class Run:
    """One training run: its teacher, order of rows and side."""

    teacher: str
    seed: int
    side: str


def found(log: Path) -> dict[Run, float]:
    """Held-out KL of each run in the log."""
    return {Run(r["teacher"], r["seed"], r["side"]): r["kl"] for r in lines_of(log)}


def missing(
    sides: list[Side], *, seeds: int, teachers: list[str], done: dict[Run, float]
) -> Iterator[tuple[Run, Side]]:
    """Yield the runs that are not done; sides take turns within a seed."""
    for seed in range(seeds):
        for teacher in teachers:
            for side in sides:
                run = Run(teacher, seed, side.name)
                if run not in done:
                    yield run, side


def shares(kl: Callable[[str], list[float]], sides: list[Side]) -> dict[str, list[float]]:
    """Side -> its share of dense TAID's gain over plain fine-tuning, for each seed."""
    gains = [plain - dense for plain, dense in zip(kl(PLAIN.name), kl(DENSE.name), strict=True)]
    return {
        side.name: [
            (plain - value) / gain for plain, value, gain in zip(kl(PLAIN.name), kl(side.name), gains, strict=True)
        ]
        for side in sides
    }


def main() -> None:
    """Train the missing runs, print the table, and store a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    from benchmarks.report import finish

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
