"""Ways of drawing from a teacher's tail, at equal bytes: noise of the gradient, and quality of students.

    python -m benchmarks.draws DEMO OUTPUT        DEMO: the output folder of a finished `coldstill demo`
    QUICK=1 ...                                   a few rules, a few rows, no training; nothing is stored

Two teachers as in `benchmarks.quality`: the demo's, which is flat, and the same sharpened. Sides, for K = 0, 4, 8, 16:

* independent draws from the full softmax, as captures made them until systematic draws came;
* systematic draws from the tail (Madow 1949) in order of ids and in order of probability, D times the tail's mass,
  rounded at random or up, or a fixed number;
* Random Sampling Knowledge Distillation (arXiv 2503.16870): K = 0, independent draws of p to a power, with weights;
* systematic draws beside the ids of at least a floor, and with the loss's control variate.

Part 1 measures the squared error of forward KL's gradient against the dense one, by logits, by hidden states and by the
head's weights, and the bytes of our codec, on held-out rows. Other rows choose the control variate's constants. Part
2 trains students with TAID as `benchmarks.quality` does, from real captures. Each finished figure or run is a line of
OUTPUT/runs.jsonl; a second start computes the missing ones only.
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

from benchmarks.common.report import finish
from benchmarks.common.run_log import append, lines_of
from benchmarks.draws.noise import Scene, load_scene, noise_of
from benchmarks.draws.plan import SEEDS, SIDES, noise_jobs, shares_of
from benchmarks.draws.rules import Control, Rule
from benchmarks.quality.plan import TEACHERS
from benchmarks.quality.runs import Bench
from coldstill.demo.settings import Layout

ROWS, QUICK_ROWS = 24, 4


def measure_noise(demo: Path, log: Path, *, quick: bool) -> None:
    """Append the missing figures of part 1."""
    done = [line["noise"] for line in lines_of(log) if "noise" in line]
    scenes: dict[tuple[str, str, str], Scene] = {}
    layout = Layout(demo)
    for job in tqdm([job for job in noise_jobs(quick) if job not in done], desc="noise"):
        key = (job["teacher"], job["student"], job["part"])
        if key not in scenes:
            scenes.clear()
            student = layout.student if job["student"] == "before" else layout.run("taid") / "student"
            count = QUICK_ROWS if quick else ROWS
            scenes[key] = load_scene(demo, student, divisor=TEACHERS[key[0]], part=key[2], count=count)
        control = None if job["control"] is None else Control(**job["control"])
        figures = noise_of(scenes[key], Rule(**job["rule"]), control)
        append(log, {"noise": job, **figures})


def train(demo: Path, output: Path, log: Path) -> None:
    """Append the missing runs of part 2; the sides of one seed and teacher take turns."""
    done = {(line["teacher"], line["seed"], line["side"]) for line in lines_of(log) if "side" in line}
    todo = [(seed, teacher, side) for seed in range(SEEDS) for teacher in TEACHERS for side in SIDES]
    benches: dict[str, Bench] = {}
    for seed, teacher, side in tqdm([one for one in todo if (one[1], one[0], one[2].name) not in done], desc="runs"):
        if teacher not in benches:
            folder = output / teacher.replace(" ", "_")
            benches[teacher] = Bench(demo, folder, divisor=TEACHERS[teacher], quick=False)
        append(log, {"teacher": teacher, "seed": seed, "side": side.name, **benches[teacher].run(side, seed=seed)})


def main() -> None:
    """Compute what is missing, print the tables, and store a full run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draws", description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="output folder of a finished `coldstill demo`")
    parser.add_argument("output", type=Path, help="folder for captures and the log; a second start resumes")
    parser.add_argument("--report", action="store_true", help="store what is finished, without computing more")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "runs.jsonl"
    if not options.report:
        measure_noise(options.demo, log, quick=quick)
        if not quick:
            train(options.demo, options.output, log)
    _report(lines_of(log), quick=quick)


def _is_complete(lines: list[dict[str, Any]], *, quick: bool) -> bool:
    """Whether all figures and runs are finished."""
    noise = [line["noise"] for line in lines if "noise" in line]
    runs = {(line["teacher"], line["seed"], line["side"]) for line in lines if "side" in line}
    wanted = set() if quick else {(t, seed, side.name) for t in TEACHERS for seed in range(SEEDS) for side in SIDES}
    return all(job in noise for job in noise_jobs(quick)) and wanted <= runs


def _report(lines: list[dict[str, Any]], *, quick: bool) -> None:
    table = Table("teacher", "K", "D", "rule", "bytes", "logits", "hidden", "head", title="noise x 1000, held-out rows")
    noise = [line for line in lines if "noise" in line]
    for line in noise:
        job, rule = line["noise"], line["noise"]["rule"]
        if job["control"] is None and job["part"] == "held_out" and job["student"] == "before":
            figures = (f"{line['bytes']:.1f}", *(f"{1000 * line[name]:.2f}" for name in ("logits", "hidden", "head")))
            table.add_row(job["teacher"], str(rule["top_k"]), str(rule["draws"]), rule["name"], *figures)
    Console().print(table)
    shares = shares_of(lines)
    for teacher, sides in shares.items():
        table = Table("side", "share of dense TAID's gain", "runs", title=f"teacher {teacher}")
        for side, values in sides.items():
            table.add_row(side, f"{statistics.mean(values):.4f}", str(len(values)))
        Console().print(table)
    finish(
        "draws",
        {
            "complete": _is_complete(lines, quick=quick),
            "share_of_dense_gain": shares,
            "noise": noise,
            "runs": [line for line in lines if "side" in line],
        },
        command="make bench-draws DEMO=DIR",
        quick=quick,
    )


if __name__ == "__main__":
    main()
