"""Ways of drawing from a teacher's tail, at equal bytes: noise of the gradient, and quality of students.

    python -m benchmarks.draws DEMO OUTPUT        DEMO: the output folder of a finished `coldstill demo`
    QUICK=1 ...                                   a few rules, a few rows, no training; nothing is stored

Two teachers as in `quality.py`: the demo's, which is flat, and the same model sharpened. Sides, for K = 0, 4, 8, 16:

* independent draws from the full softmax, as captures made them until systematic draws came;
* systematic draws from the tail (Madow 1949) in order of ids and in order of probability, D times the tail's mass,
  rounded at random or up, or a fixed number;
* Random Sampling Knowledge Distillation (arXiv 2503.16870): K = 0, independent draws of p to a power, with weights;
* systematic draws beside the ids of at least a floor, and with the loss's control variate.

Part 1 measures the squared error of forward KL's gradient against the dense one, by logits, by hidden states and by the
head's weights, and the bytes of our codec, on held-out rows. Other rows choose the control variate's constants. Part
2 trains students with TAID as `quality.py` does, from real captures. Each finished figure or run is a line of
OUTPUT/runs.jsonl; a second start computes the missing ones only.
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

from benchmarks.draws_noise import Scene, load_scene, noise_of
from benchmarks.draws_rules import Control, Rule
from benchmarks.quality import DENSE, PLAIN, TEACHERS
from benchmarks.quality_runs import Bench, Cache, Side
from benchmarks.report import finish
from benchmarks.run_log import append, lines_of
from coldstill.demo.settings import Layout

ROWS, QUICK_ROWS = 24, 4
SEEDS = 3
TODAY = Rule(name="independent, at most 32 kept", top_k=16, most=32)
SIDES = [
    PLAIN,
    DENSE,
    Side("K=16, D=64, iid, kept 32", Cache(16, 64, 32, "iid")),
    *(
        Side(f"K={k}, D={d}, systematic, kept 64", Cache(k, d, 64, "systematic"))
        for k, d in ((4, 32), (4, 64), (8, 32), (8, 48), (8, 64), (16, 64))
    ),
    Side("K=8, D=32, systematic+lp, kept 64", Cache(8, 32, 64, "systematic", logprobs=True)),
    Side("K=8, D=64, systematic+lp, kept 64", Cache(8, 64, 64, "systematic", logprobs=True)),
]
"""Trained from captures; `lp`: with log-probs of the draws, for the control variate."""


def rules() -> list[Rule]:
    """The rules of part 1."""
    found = [TODAY]
    systematic: dict[str, Any] = {"method": "systematic", "origin": "tail", "number": "rounded"}
    for draws in (16, 32, 64):
        for top_k in (4, 8, 16):
            found.append(Rule(name="independent", top_k=top_k, draws=draws))
            found.append(Rule(name="systematic", top_k=top_k, draws=draws, **systematic))
            found.append(
                Rule(name="systematic by probability", top_k=top_k, draws=draws, order="probability", **systematic)
            )
        up = {**systematic, "number": "rounded_up"}
        found.append(Rule(name="systematic, rounded up", top_k=8, draws=draws, **up))
        found.append(Rule(name="systematic, floor 1/D", top_k=16, min_prob=1 / draws, draws=draws, **systematic))
        found.append(Rule(name="independent", top_k=0, draws=draws))
        found.append(Rule(name="systematic", top_k=0, draws=draws, method="systematic"))
        found.append(Rule(name="random sampling, power 0.8", top_k=0, draws=draws, power=0.8))
    found += [Rule(name="systematic, fixed", top_k=16, draws=d, method="systematic", origin="tail") for d in (4, 16)]
    return found


def controls() -> list[Control]:
    """The constants to choose from."""
    return [Control(share, limit) for share in (0.25, 0.5, 0.75, 1.0) for limit in (4.0, 50.0)]


def noise_jobs(quick: bool) -> Iterator[dict[str, Any]]:
    """The keys of part 1: teacher, student, part, rule and control."""
    for teacher in list(TEACHERS)[: 1 if quick else None]:
        for rule in [rules()[0], *rules()[4:6]] if quick else rules():
            yield {"teacher": teacher, "student": "before", "part": "held_out", "rule": vars(rule), "control": None}
        controlled = Rule(name="systematic", top_k=8, draws=64, method="systematic", origin="tail", number="rounded")
        for student in () if quick else ("before", "after"):
            for part in ("choose", "held_out"):
                for control in (None, *controls()):
                    named = None if control is None else vars(control)
                    facts = {"teacher": teacher, "student": student, "part": part}
                    yield {**facts, "rule": vars(controlled), "control": named}


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


def shares_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Teacher -> side -> share of dense TAID's gain over plain fine-tuning, for each seed that has all three."""
    kl = {(line["teacher"], line["side"], line["seed"]): line["kl"] for line in lines if "side" in line}
    found: dict[str, dict[str, list[float]]] = {}
    for (teacher, side, seed), value in sorted(kl.items(), key=lambda item: item[0][2]):
        plain, dense = kl.get((teacher, PLAIN.name, seed)), kl.get((teacher, DENSE.name, seed))
        if plain is not None and dense is not None:
            share = round((plain - value) / (plain - dense), 4)
            found.setdefault(teacher, {}).setdefault(side, []).append(share)
    return found


def main() -> None:
    """Compute what is missing, print the tables, and store a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
