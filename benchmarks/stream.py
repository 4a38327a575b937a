"""The loader: how many target positions it decodes and gives to a trainer each second on one core.

    python -m benchmarks.stream [--cache DIR]    the first run trains the teacher, about ten minutes
    QUICK=1 ...                                  one teacher, fewer rows and rounds; nothing is stored

A small teacher's distributions, flat and sharp, K = 16 and 64, rows of 512 targets, as sealed datasets: with all K ids,
and with a floor and draws; beside them naive Parquet lists of the K ids. Sides: decoding alone, from shards on disk to
arrays of each row; the whole loader, from disk and from an S3 server with an empty cache, to shuffled batches of
tensors, padded or packed. Each side is a process of its own, all on one core, and they take turns.

Speeds are targets per second of CPU time of the whole process, medians over rounds; from S3 also on the clock, as the
server works on another core. Verdicts compare the worse teacher's median with the goal.
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

from benchmarks.report import finish
from benchmarks.stream_data import Stored, store
from benchmarks.stream_sides import SideProcess, Turn, s3_server, sides_of, upload
from benchmarks.teacher_distributions import TEMPERAMENTS, load_distributions

CACHE = Path(__file__).parent.parent / ".bench_cache"
TOP_KS = (16, 64)
GOALS = {
    "decode_targets_per_s_core_fixed": 1_000_000,
    "decode_targets_per_s_core": 600_000,
    "loader_targets_per_s_core": 300_000,
}

Key = tuple[str, int, str]
"""Teacher, K, side."""


def measured(all_stored: list[Stored], *, rounds: int) -> dict[Key, list[Turn]]:
    """Turns of each side; one before the first round is not counted."""
    core = min(os.sched_getaffinity(0))
    turns: dict[Key, list[Turn]] = defaultdict(list)
    with tqdm(desc="loader", unit=" turns") as bar:
        for stored in all_stored:
            bucket = f"s3://stream/{stored.temperament}-{stored.top_k}"
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
                        turns[stored.temperament, stored.top_k, name].append(turn)
            for process in processes.values():
                process.close()
    return turns


def per_cpu_s(turns: list[Turn]) -> list[float]:
    """Targets per second of CPU time, each round."""
    return [turn.targets / turn.cpu_s for turn in turns]


def times_faster(turns: dict[Key, list[Turn]], ours: str, theirs: str) -> float:
    """The least over teachers and K of the median of the rounds' own ratios."""
    ratios = []
    for temperament, top_k, name in turns:
        if name == ours:
            rival = per_cpu_s(turns[temperament, top_k, theirs])
            mine = per_cpu_s(turns[temperament, top_k, ours])
            ratios.append(statistics.median(a / b for a, b in zip(mine, rival, strict=True)))
    return round(min(ratios), 3)


def figures_of(turns: dict[Key, list[Turn]]) -> dict[str, Any]:
    """What is compared from release to release: of both teachers, and of both K for the loader, the slower one."""

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
    """A table per teacher and K, then the verdicts."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the teacher is kept for later runs")
    asked = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    distributions = load_distributions(asked.cache)
    with tempfile.TemporaryDirectory() as folder, s3_server():
        all_stored = [
            store(
                distributions[temperament],
                temperament=temperament,
                top_k=top_k,
                copies=4 if quick else 16,
                folder=Path(folder, f"{temperament}-{top_k}"),
            )
            for temperament in (TEMPERAMENTS[:1] if quick else TEMPERAMENTS)
            for top_k in TOP_KS
        ]
        turns = measured(all_stored, rounds=3 if quick else 7)
    figures = figures_of(turns)
    show(figures, Console(width=None if Console().is_terminal else 160))
    finish("stream", figures, command="make bench-stream", quick=quick)


if __name__ == "__main__":
    main()
