"""Speed of the loader: target positions per second on one core, from shards to batches.

    python -m benchmarks.stream [--cache DIR]    the first run trains the teacher, about ten minutes
    QUICK=1 ...                                  one teacher, fewer rows and rounds; nothing is stored

The data are a small teacher's distributions, flat and sharp, with K = 16 and 64, in rows of 512 targets. They are
stored as sealed datasets, with all K ids and with a floor and draws, and as naive Parquet lists of the K ids. Sides
are:

* decoding alone, from shards on disk to the arrays of each row;
* the whole loader, from disk or from an S3 server with an empty cache, to shuffled batches of tensors, padded or
  packed.

Each side has its own process. All run on one core and take turns. Speeds are targets per second of CPU time of the
whole process, as medians over rounds; S3 also has wall time, because the server runs on another core. Verdicts compare
the median of the worse teacher with the goal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.report import finish
from benchmarks.inputs import CACHE
from benchmarks.inputs.teacher_distributions import SHARPNESSES, load_distributions
from benchmarks.stream.data import Stored, store
from benchmarks.stream.sides import SideProcess, Turn, s3_server, sides_of, upload

TOP_KS = (16, 64)
GOALS = {
    "decode_targets_per_s_core_fixed": 1_000_000,
    "decode_targets_per_s_core": 600_000,
    "loader_targets_per_s_core": 300_000,
}

Key = tuple[str, int, str]
"""Teacher, K, side."""


def measured(all_stored: list[Stored], *, rounds: int) -> dict[Key, list[Turn]]:
    """The turns of each side, after one warm-up turn."""
    core = min(os.sched_getaffinity(0))
    turns: dict[Key, list[Turn]] = defaultdict(list)
    with tqdm(desc="loader", unit=" turns") as bar:
        for stored in all_stored:
            bucket = f"s3://stream/{stored.sharpness}-{stored.top_k}"
            upload(stored.drawn, bucket)
            sides = sides_of(stored, bucket)
            processes = {name: SideProcess(work, given, core=core) for name, (work, given) in sides.items()}
            for number in range(rounds + 1):
                for name, process in processes.items():
                    turn = process.turn()
                    bar.update()
                    if turn.targets != stored.targets:
                        raise SystemExit(f"benchmark failed: {name} gave {turn.targets} of {stored.targets} targets")
                    if number:
                        turns[stored.sharpness, stored.top_k, name].append(turn)
            for process in processes.values():
                process.close()
    return turns


def per_cpu_s(turns: list[Turn]) -> list[float]:
    """Targets per second of CPU time, for each round."""
    return [turn.targets / turn.cpu_s for turn in turns]


def times_faster(turns: dict[Key, list[Turn]], ours: str, theirs: str) -> float:
    """The smallest value over teachers and K of the median of the rounds' own ratios."""
    ratios = []
    for sharpness, top_k, name in turns:
        if name == ours:
            rival = per_cpu_s(turns[sharpness, top_k, theirs])
            mine = per_cpu_s(turns[sharpness, top_k, ours])
            ratios.append(statistics.median(a / b for a, b in zip(mine, rival, strict=True)))
    return round(min(ratios), 3)


def figures_of(turns: dict[Key, list[Turn]]) -> dict[str, Any]:
    """The figures to compare between releases: those of the slower teacher and, for the loader, the slower K."""

    def slowest(side: str, top_ks: tuple[int, ...]) -> int:
        found = [per_cpu_s(found) for (_, top_k, name), found in turns.items() if name == side and top_k in top_ks]
        return round(min(map(statistics.median, found)))

    figures: dict[str, Any] = {
        "decode_targets_per_s_core": slowest("decode, floor and draws", (64,)),
        "decode_targets_per_s_core_fixed": slowest("decode, K ids", (64,)),
        "loader_targets_per_s_core": slowest("loader, floor and draws", TOP_KS),
        "loader_targets_per_s_core_packed": slowest("loader, floor and draws, packed", TOP_KS),
        "loader_targets_per_s_core_s3": slowest("loader, floor and draws, S3", TOP_KS),
        "decode_over_naive": times_faster(turns, "decode, K ids", "decode, naive lists of K ids"),
        "loader_over_naive": times_faster(turns, "loader, K ids", "loader, naive lists of K ids"),
    }
    return {
        **figures,
        "verdicts": {
            name: f"{'reaches' if figures[name] >= goal else 'misses'} {goal}" for name, goal in GOALS.items()
        },
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "lines": [_line(key, found) for key, found in turns.items()],
    }


def _line(key: Key, turns: list[Turn]) -> dict[str, Any]:
    rates = per_cpu_s(turns)
    return {
        **dict(zip(("teacher", "top_k", "side"), key, strict=True)),
        "targets_per_cpu_s": [round(function(rates)) for function in (statistics.median, min, max)],
        "targets_per_s": round(statistics.median(turn.targets / turn.wall_s for turn in turns)),
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Print a table per teacher and K, then the verdicts."""
    groups = dict.fromkeys((line["teacher"], line["top_k"]) for line in figures["lines"])
    for teacher, top_k in groups:
        columns = ("side", "targets per CPU second", "slowest to fastest", "per second")
        table = Table(*columns, title=f"{teacher} teacher, K = {top_k}")
        for line in figures["lines"]:
            if (line["teacher"], line["top_k"]) == (teacher, top_k):
                middle, low, high = line["targets_per_cpu_s"]
                spread = f"{low:,} to {high:,}"
                table.add_row(line["side"], f"{middle:,}", spread, f"{line['targets_per_s']:,}")
        console.print(table)
    for name, verdict in figures["verdicts"].items():
        console.print(f"{name}: {figures[name]:,}, {verdict}")


def main() -> None:
    """Measure, print, and store a full run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the teacher for later runs")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    distributions = load_distributions(options.cache)
    with tempfile.TemporaryDirectory() as folder, s3_server():
        all_stored = [
            store(
                distributions[sharpness],
                sharpness=sharpness,
                top_k=top_k,
                copies=4 if quick else 16,
                folder=Path(folder, f"{sharpness}-{top_k}"),
            )
            for sharpness in (SHARPNESSES[:1] if quick else SHARPNESSES)
            for top_k in TOP_KS
        ]
        turns = measured(all_stored, rounds=3 if quick else 7)
    figures = figures_of(turns)
    show(figures, Console(width=None if Console().is_terminal else 160))
    finish("stream", figures, command="make bench-stream", quick=quick)


if __name__ == "__main__":
    main()
