"""Training runs over teachers, orders of rows and sides: trains those that the log lacks, and finds each side's share.

The log is OUTPUT/runs.jsonl; a line with a `side` is a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.run_log import append, lines_of
from benchmarks.common.shares import shares_of_gain
from benchmarks.draws.plan import DENSE, PLAIN, TEACHERS, Run

LOG = "runs.jsonl"
Lines = list[dict[str, Any]]


def key_of(line: dict[str, Any]) -> tuple[str, int, str]:
    """Teacher, seed and side of a line of the log."""
    return line["teacher"], line["seed"], line["side"]


def runs_of(log: Path) -> Lines:
    """The lines of the log that are runs."""
    return [line for line in lines_of(log) if "side" in line]


def missing(runs: Iterable[Run], log: Path) -> Iterator[Run]:
    """Yield the runs that the log does not have, in order."""
    done = {key_of(line) for line in runs_of(log)}
    return (run for run in runs if run.key not in done)


def train_missing(
    runs: Iterable[Run],
    *,
    demo: Path,
    output: Path,
    quick: bool,
    rows: Path | None = None,
    targets: int | None = None,
) -> None:
    """Train the missing runs, in order, on the models of `demo`, and append each to the log of `output`."""
    from benchmarks.draws.students import Bench

    log, benches = output / LOG, dict[str, Bench]()
    for run in tqdm(list(missing(runs, log)), desc="runs"):
        if run.teacher not in benches:
            folder = output / run.teacher.replace(" ", "_")
            benches[run.teacher] = Bench(
                demo, folder, divisor=TEACHERS[run.teacher], quick=quick, rows=rows, targets=targets
            )
        figures = benches[run.teacher].run(run.side, seed=run.seed)
        append(log, {"teacher": run.teacher, "seed": run.seed, "side": run.side.name, **figures})


def kls_of(runs: Lines) -> dict[str, dict[str, dict[int, float]]]:
    """Teacher -> side -> seed -> held-out KL, with seeds in order."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault(run["teacher"], {}).setdefault(run["side"], {})[run["seed"]] = run["kl"]
    return found


def shares_of(runs: Lines, *, digits: int = 4) -> dict[str, dict[str, list[float]]]:
    """Teacher -> side -> share of dense TAID's gain over plain fine-tuning, for each seed that has all three."""
    found = {}
    for teacher, kls in kls_of(runs).items():
        of_sides = shares_of_gain(kls, floor=PLAIN.name, dense=DENSE.name)
        if known := {side: [round(share, digits) for share in shares] for side, shares in of_sides.items() if shares}:
            found[teacher] = known
    return found
