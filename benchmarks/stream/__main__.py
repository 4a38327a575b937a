"""Speed of the loader: target positions per second on one core, from shards to batches.

The data are a small teacher's distributions, flat and sharp, with K = 16 and 64, in rows of 512 targets. They are
stored as sealed datasets, with all K ids and with a floor and draws, and as naive Parquet lists of the K ids. Sides
are:

* decoding alone, from shards on disk to the arrays of each row;
* the whole loader, from disk or from an S3 server with an empty cache, to shuffled batches of tensors, padded or
  packed.

Each side has its own process. All run on one core and take turns. Speeds are targets per second of CPU time of the
whole process, as medians over rounds; S3 also has wall time, because the server runs on another core. Verdicts compare
the worse teacher with the goal; there is none if its quartiles enclose the goal.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish, load_average, wide_console
from benchmarks.common.spread import Spread, ratio, spread, verdict
from benchmarks.inputs import CACHE

if TYPE_CHECKING:
    from benchmarks.stream.data import Stored
    from benchmarks.stream.sides import Turn

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
    from benchmarks.stream.sides import SideProcess, sides_of, upload

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
    ratios = [
        ratio(per_cpu_s(found), per_cpu_s(turns[sharpness, top_k, theirs])).middle
        for (sharpness, top_k, name), found in turns.items()
        if name == ours
    ]
    return round(min(ratios), 3)


def figures_of(turns: dict[Key, list[Turn]]) -> dict[str, Any]:
    """The figures to compare between releases: those of the slower teacher and, for the loader, the slower K."""

    def slowest(side: str, top_ks: Iterable[int] = TOP_KS) -> Spread:
        return min(
            spread(per_cpu_s(found)) for (_, top_k, name), found in turns.items() if name == side and top_k in top_ks
        )

    speeds = {
        "decode_targets_per_s_core": slowest("decode, floor and draws", (64,)),
        "decode_targets_per_s_core_fixed": slowest("decode, K ids", (64,)),
        "loader_targets_per_s_core": slowest("loader, floor and draws"),
        "loader_targets_per_s_core_packed": slowest("loader, floor and draws, packed"),
        "loader_targets_per_s_core_s3": slowest("loader, floor and draws, S3"),
    }
    return {
        **{name: round(found.middle) for name, found in speeds.items()},
        "decode_over_naive": times_faster(turns, "decode, K ids", "decode, naive lists of K ids"),
        "loader_over_naive": times_faster(turns, "loader, K ids", "loader, naive lists of K ids"),
        "quartiles": {name: [round(found.low), round(found.high)] for name, found in speeds.items()},
        "verdicts": {name: verdict(speeds[name], goal) for name, goal in GOALS.items()},
        "load_average": load_average(),
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
                table.add_row(line["side"], f"{middle:,}", f"{low:,} to {high:,}", f"{line['targets_per_s']:,}")
        console.print(table)
    for name, found in figures["verdicts"].items():
        console.print(f"{name}: {figures[name]:,}, {found}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store a full run."""
    parser = new_parser(
        "stream",
        __doc__,
        make="bench-stream, which runs `benchmarks.stream_readers` too",
        takes="minutes; the first run trains the teacher, about ten minutes more",
        quick="one teacher, fewer rows and rounds",
        result="stream",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the teacher for later runs")
    options, quick = parser.parse_args(arguments), is_quick()
    from benchmarks.inputs.teacher_distributions import SHARPNESSES, load_distributions
    from benchmarks.stream.data import store
    from benchmarks.stream.sides import s3_server

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
    show(figures, wide_console(160))
    finish("stream", figures, command="make bench-stream", quick=quick)


if __name__ == "__main__":
    main()
