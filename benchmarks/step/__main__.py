"""Time and memory of a whole training step of a tiny student: TAID from a cache, compared with plain fine-tuning.

    python -m benchmarks.step         QUICK=1: one round, fewer steps and rows, under three minutes; nothing is stored

Each side has its own process and one thread; sides take turns in every round, on the same rows and batches:

* `plain, Trainer`: transformers' Trainer on tokens and labels, with logits of the whole batch, as usual;
* `plain, fused`: our trainer with cross-entropy and the fused head, the lowest cost of fine-tuning;
* `TAID, cache`: our trainer with TAID from the cache;
* `TAID, teacher resident`: as in the paper, with a teacher of eight times the student's body in the same process.

A step lasts from the end of one optimizer step to the end of the next: reading, decoding, forward, loss, backward,
optimizer. Peak memory is that of the whole run, above the level before models and data are loaded. The goal: TAID from
the cache takes at most 1.10 of the time and memory of `plain, fused`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.report import finish
from benchmarks.step.sides import QUICK_ROWS, ROWS, SIDES, make_models_and_dataset

PLAIN, FUSED, CACHED, RESIDENT = SIDES
GOAL = 1.10


def measure(side: str, folder: Path, *, steps: int) -> dict[str, float]:
    """Seconds of a step and peak bytes of a run, measured in a child process."""
    command = [sys.executable, "-m", "benchmarks.step.case", side, str(folder), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(found: dict[str, list[dict[str, float]]], over: str, under: str, what: str) -> list[float]:
    """The ratio of each round."""
    return [a[what] / b[what] for a, b in zip(found[over], found[under], strict=True)]


def main() -> None:
    """Measure, print, store."""
    quick = os.environ.get("QUICK", "0") not in ("", "0")
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
    figures: dict[str, Any] = {
        f"taid_over_{name}_{label}": round(statistics.median(ratios(found, CACHED, side, what)), 3)
        for name, side in pairs.items()
        for label, what in (("time", "step_s"), ("memory", "peak_bytes"))
    }
    load = [round(value, 2) for value in os.getloadavg()]
    figures |= {"goal": GOAL, "threads": 1, "load_average": load, "rounds": dict(found)}
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
            f"{statistics.median(ratios(found, side, FUSED, 'step_s')):.2f}",
            f"{statistics.median(ratios(found, side, FUSED, 'peak_bytes')):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
