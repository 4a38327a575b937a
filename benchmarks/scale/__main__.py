"""Cost of a driver as captures grow: planning, resuming, assigning units.

1. On a local disk: planning a source of up to 1,000,000 units, and resuming when all but one are committed. Seconds,
   and memory above that of importing torch and transformers, each in its own process.
2. On an object store (an S3 server on this machine): requests of a start.
3. 1 to 16 workers on Ray with an engine that sleeps: the share of the time in which engines are busy.
4. The driver's time per unit as their number grows. The units are already committed, so workers answer at once.

The run fails if planning or resuming 1,000,000 units takes more than 20 s or 500 MB, if a start needs more than one
LIST per 1,000 commit records or opens one, or if the cost per unit grows with their number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish, wide_console

MOST_SECONDS, MOST_MB = 20.0, 500
MOST_GROWTH = 1.5
"""Limit of the growth of the driver's time per unit, from the fewest units to the most."""
SLEEP_S = 1.0

Lines = list[dict[str, Any]]


def broken_laws(disk: Lines, store: dict[str, Any], units: Lines) -> list[str]:
    """What does not hold, in words."""
    largest = disk[-1]
    seconds, peak = largest["plan_s"] + largest["resume_s"], max(largest["plan_mb"], largest["resume_mb"])
    growth = units[-1]["processor_ms"] / units[0]["processor_ms"]
    laws = {
        f"planning or resuming took {seconds:.1f} s": seconds <= MOST_SECONDS,
        f"planning or resuming took {peak} MB": peak <= MOST_MB,
        f"{store['lists_of_commits']} lists for {store['commits']} commit records": store["lists_of_commits"]
        <= store["most_lists"],
        f"{store['commits_opened']} commit records were opened": not store["commits_opened"],
        f"a unit's cost grew by {growth:.2f}": growth <= MOST_GROWTH,
    }
    return [law for law, holds in laws.items() if not holds]


def print_lines(title: str, lines: Lines, console: Console) -> None:
    """Print one table."""
    table = Table(*lines[0], title=title, title_justify="left")
    for line in lines:
        table.add_row(*(f"{value:,}" for value in line.values()))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store a full run."""
    parser = new_parser(
        "scale",
        __doc__,
        make="bench-scale",
        takes="minutes; it writes a million small files into a temporary folder",
        quick="fewer units and workers, under three minutes",
        result="scale",
    )
    parser.parse_args(arguments)
    from benchmarks.scale.measures import dispatch, on_disk, on_object_store, with_workers

    quick = is_quick()
    with tempfile.TemporaryDirectory(prefix="coldstill-scale-") as name:
        folder = Path(name)
        disk = on_disk(folder, sizes=[1_000, 20_000] if quick else [1_000, 10_000, 100_000, 1_000_000])
        store = on_object_store(folder, units=1_501 if quick else 10_001)
        workers = with_workers(folder, counts=[1, 2] if quick else [1, 2, 4, 8, 16], sleep_s=SLEEP_S)
        units = dispatch(folder, sizes=[1_000, 3_000] if quick else [1_000, 10_000, 100_000])
        # Report before the folder is removed: removing a million files takes minutes.
        _report(disk, store, workers, units, quick=quick)
    if broken := broken_laws(disk, store, units):
        raise SystemExit("benchmark failed: " + "; ".join(broken))


def _report(disk: Lines, store: dict[str, Any], workers: Lines, units: Lines, *, quick: bool) -> None:
    console = wide_console(120)
    print_lines("planning and resuming, local disk", disk, console)
    print_lines("a start on an object store", [store], console)
    print_lines(f"workers whose engines sleep {SLEEP_S:g} s per unit", workers, console)
    print_lines("the driver's time per unit", units, console)
    document = {"disk": disk, "object_store": store, "workers": workers, "dispatch": units}
    finish("scale", document, command="make bench-scale", quick=quick)


if __name__ == "__main__":
    main()
