"""Time and memory of a whole training step of a tiny student: TAID from a cache, compared with plain fine-tuning.

Each side has its own process and one thread; sides take turns in every round, on the same rows and batches:

* `plain, Trainer`: transformers' Trainer on tokens and labels, with logits of the whole batch, as usual;
* `plain, fused`: our trainer with cross-entropy and the fused head, the lowest cost of fine-tuning;
* `TAID, cache`: our trainer with TAID from the cache;
* `TAID, teacher resident`: as in the paper, with a teacher of eight times the student's body in the same process.

A step lasts from the end of one optimizer step to the end of the next: reading, decoding, forward, loss, backward,
optimizer. Peak memory is that of the whole run, above the level before models and data are loaded. The goal: TAID from
the cache takes at most 1.10 of the time and memory of `plain, fused`. If the quartiles enclose it, there is no verdict.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish, load_average
from benchmarks.common.spread import Spread, ratio, verdict
from benchmarks.step import CACHED, FUSED, PLAIN, RESIDENT, SIDES

ROWS, QUICK_ROWS = 96, 32
GOAL = 1.10
GOALS = ("taid_over_sft_time", "taid_over_sft_memory")
"""Ratios that the goal limits."""


def measure(side: str, folder: Path, *, steps: int) -> dict[str, float]:
    """Seconds of a step and peak bytes of a run, measured in a child process."""
    command = [sys.executable, "-m", "benchmarks.step.case", side, str(folder), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratio_of(found: dict[str, list[dict[str, float]]], over: str, under: str, what: str) -> Spread:
    """Of the rounds' ratios of two sides."""
    return ratio((each[what] for each in found[over]), (each[what] for each in found[under]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, store."""
    parser = new_parser(
        "step",
        __doc__,
        make="bench-step",
        takes="minutes",
        quick="one round, fewer steps and rows, under three minutes",
        result="step",
    )
    parser.parse_args(arguments)
    from benchmarks.step.sides import make_models_and_dataset

    quick = is_quick()
    rounds, steps, row_count = (1, 2, QUICK_ROWS) if quick else (3, 6, ROWS)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="coldstill-step-") as name:
        folder = Path(name)
        make_models_and_dataset(folder, row_count=row_count)
        with tqdm(total=rounds * len(SIDES), desc="steps", unit="run") as bar:
            for _ in range(rounds):
                for side in SIDES:
                    found[side].append(measure(side, folder, steps=steps))
                    bar.update()
    _print(found)
    pairs = {"sft": FUSED, "trainer_sft": PLAIN, "resident": RESIDENT}
    ratios = {
        f"taid_over_{name}_{label}": ratio_of(found, CACHED, side, what)
        for name, side in pairs.items()
        for label, what in (("time", "step_s"), ("memory", "peak_bytes"))
    }
    figures: dict[str, Any] = {
        **{name: round(of.middle, 3) for name, of in ratios.items()},
        "quartiles": {name: [round(of.low, 3), round(of.high, 3)] for name, of in ratios.items()},
        "verdicts": {name: verdict(ratios[name], GOAL, is_limit=True) for name in GOALS if not quick},
        "goal": GOAL,
        "threads": 1,
        "load_average": load_average(),
        "rounds": dict(found),
    }
    for name, of in figures["verdicts"].items():
        print(f"{name}: {figures[name]:.3f}, {of}")
    finish("step", figures, command="make bench-step", quick=quick)


def _print(found: dict[str, list[dict[str, float]]]) -> None:
    table = Table(
        "side",
        "s per step",
        "min to max",
        "peak MB",
        "time",
        "memory",
        title="time and memory relative to `plain, fused`",
    )
    for side, lines in found.items():
        seconds, peak = [line["step_s"] for line in lines], [line["peak_bytes"] for line in lines]
        table.add_row(
            side,
            f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f} to {max(seconds):.3f}",
            f"{statistics.median(peak) / 1e6:,.0f}",
            f"{ratio_of(found, side, FUSED, 'step_s').middle:.2f}",
            f"{ratio_of(found, side, FUSED, 'peak_bytes').middle:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
