"""Work of the loader by its number of processes: 1, 2 and 4 workers on 1 and 2 ranks of one machine.

Each turn reads one epoch of a local dataset, packed, with an empty cache folder: the ranks are processes that start
together, each with its DataLoader. Sides take turns. Measured are target positions per second, those per second of
CPU time of all processes, bytes hashed, bytes read by system calls, and row groups of which the frames were decoded.
The rows are random (V = 64, K = 16, 8 draws, 256 to 511 tokens): the work of reading them is that of a teacher's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish, wide_console

if TYPE_CHECKING:
    from benchmarks.stream.epochs import Turn

SIDES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
"""Workers of each rank, and ranks."""


def measured(*, shards: int, rounds: int) -> dict[str, Any]:
    """The figures of all sides, after one warm-up round."""
    from benchmarks.stream.epochs import Counts, count_work, turn, write

    counts = Counts()
    count_work(counts)
    turns: dict[tuple[int, int], list[Turn]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), shards=shards)
        stored = sum(file.stat().st_size for file in Path(path, "shards").iterdir())
        for number in range(rounds + 1):
            for side in SIDES:
                found = turn(path, *side, counts)
                if number:
                    turns[side].append(found)
    if len({found.targets for sides in turns.values() for found in sides}) != 1:
        raise SystemExit("benchmark failed: sides read different numbers of targets")
    return {"shards": shards, "bytes_stored": stored, "rounds": rounds, "lines": [_line(*of) for of in turns.items()]}


def _line(side: tuple[int, int], turns: list[Turn]) -> dict[str, Any]:
    def spread(values: list[float]) -> list[int]:
        return [round(function(values)) for function in (statistics.median, min, max)]

    return {
        "workers": side[0],
        "ranks": side[1],
        "targets_per_s": spread([found.targets / found.wall_s for found in turns]),
        "targets_per_cpu_s": spread([found.targets / found.cpu_ns * 1e9 for found in turns]),
        "bytes_hashed": round(statistics.median(found.hashed for found in turns)),
        "bytes_read": round(statistics.median(found.read for found in turns)),
        "row_groups_decoded": round(statistics.median(found.groups for found in turns)),
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Print a table."""
    columns = ("workers x ranks", "targets per second", "per CPU second", "MB hashed", "MB read", "row groups")
    title = f"{figures['shards']} shards of one row group, {figures['bytes_stored'] / 1e6:.1f} MB"
    table = Table(*columns, title=title)
    for line in figures["lines"]:
        rates = ["{:,} ({:,} to {:,})".format(*line[name]) for name in ("targets_per_s", "targets_per_cpu_s")]
        sizes = [f"{line[name] / 1e6:.1f}" for name in ("bytes_hashed", "bytes_read")]
        table.add_row(f"{line['workers']} x {line['ranks']}", *rates, *sizes, str(line["row_groups_decoded"]))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store a full run."""
    parser = new_parser(
        "stream_readers",
        __doc__,
        make="bench-stream, which runs `benchmarks.stream` too",
        takes="minutes",
        quick="fewer shards and rounds",
        result="stream_readers",
    )
    parser.parse_args(arguments)
    quick = is_quick()
    figures = measured(shards=8 if quick else 16, rounds=2 if quick else 3)
    show(figures, wide_console(160))
    finish("stream_readers", figures, command="python -m benchmarks.stream_readers", quick=quick)


if __name__ == "__main__":
    main()
