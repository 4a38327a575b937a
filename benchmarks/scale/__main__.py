"""Cost of a driver as captures grow: planning, resuming, assigning units.

    python -m benchmarks.scale        QUICK=1: fewer units and workers, under three minutes, nothing is stored

1. On a local disk: planning a source of up to 1,000,000 units, and resuming when all but one are committed. Seconds,
   and memory above that of importing torch and transformers, each in its own process.
2. On an object store (an S3 server on this machine): requests of a start.
3. 1 to 16 workers on Ray with an engine that sleeps: the share of the time in which engines are busy.
4. The driver's time per unit as their number grows. The units are already committed, so workers answer at once.

The run fails if planning or resuming 1,000,000 units takes more than 20 s or 500 MB, if a start needs more than one
LIST per 1,000 commit records or opens one, or if the cost per unit grows with their number.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.report import finish
from benchmarks.scale.captures import new_capture, pretend_committed, record_of
from benchmarks.scale.teacher import Sleeping
from coldstill.pipeline.capture import remaining
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.commits import commit_name

MOST_SECONDS, MOST_MB = 20.0, 500
MOST_GROWTH = 1.5
"""Limit of the growth of the driver's time per unit, from the fewest units to the most."""
SLEEP_S = 1.0
UNITS_PER_WORKER = 20

Lines = list[dict[str, Any]]


def on_disk(folder: Path, *, sizes: list[int]) -> Lines:
    """Plan and resume captures, from the smallest to the largest."""
    lines = []
    for units in tqdm(sizes, desc="planning"):
        config = new_capture(folder / f"disk-{units}", units=units)
        planned = _start(folder / f"disk-{units}" / "capture.yaml")
        pretend_committed(Path(config.output), range(units - 1))
        resumed = _start(folder / f"disk-{units}" / "capture.yaml")
        assert (planned["todo"], resumed["todo"]) == (units, 1)
        lines.append(
            {
                "units": units,
                "plan_s": planned["seconds"],
                "plan_mb": planned["mb"],
                "resume_s": resumed["seconds"],
                "resume_mb": resumed["mb"],
                "import_mb": resumed["import_mb"],
            }
        )
    return lines


def _start(config: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale.start", str(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def on_object_store(folder: Path, *, units: int) -> dict[str, Any]:
    """Count the requests of a start with `units - 1` commit records, and of counting these records."""
    import fsspec

    from tests.storage_schema.store.s3_server import S3Server

    server = S3Server()
    os.environ.update(
        AWS_ENDPOINT_URL=server.url,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
    )
    bucket = fsspec.filesystem("s3")
    bucket.mkdir("scale")
    config = new_capture(folder / "store", units=units, output="s3://scale/dataset")
    prepare(config)
    records = {f"scale/dataset/{commit_name(unit)}": record_of(unit) for unit in range(units - 1)}
    bucket.pipe(records)
    server.forget()
    prepared = prepare(config)
    before = len(server.lists)
    todo = remaining(prepared).todo
    counting, whole = len(server.lists) - before, len(server.lists)
    opened = [path for method, path in server.requests if method == "GET" and "/commits/" in path]
    requests = len(server.requests)
    server.stop()
    assert todo == [units - 1]
    return {
        "commits": units - 1,
        "lists_of_commits": counting,
        "most_lists": math.ceil((units - 1) / 1000),
        "lists_of_a_start": whole,
        "requests_of_a_start": requests,
        "commits_opened": len(opened),
    }


def with_workers(folder: Path, *, counts: list[int]) -> Lines:
    """Measure how busy sleeping engines are, by number of workers."""
    from coldstill.pipeline.cluster.pool import WorkerPool

    lines = []
    for workers in tqdm(counts, desc="workers"):
        units = workers * UNITS_PER_WORKER
        config = new_capture(
            folder / f"workers-{workers}", units=units, min_workers=workers, max_workers=workers, gpus_per_worker=0
        )
        todo = remaining(prepare(config)).todo
        ends: list[float] = []
        with WorkerPool(config, load=Sleeping(SLEEP_S)) as pool:
            for _ in pool.run_units(todo):
                ends.append(time.monotonic())
        # All workers start together; the first end shows when that was.
        seconds = ends[-1] - ends[0] + SLEEP_S
        lines.append({"workers": workers, "units": units, "efficiency": round(units * SLEEP_S / workers / seconds, 3)})
    return lines


def dispatch(folder: Path, *, sizes: list[int]) -> Lines:
    """The driver's processor time and the clock's for a unit, two workers."""
    from coldstill.pipeline.cluster.pool import WorkerPool

    lines = []
    for units in tqdm(sizes, desc="units"):
        config = new_capture(folder / f"units-{units}", units=units, min_workers=2, max_workers=2, gpus_per_worker=0)
        todo = remaining(prepare(config)).todo
        pretend_committed(Path(config.output), todo)
        with WorkerPool(config, load=Sleeping(0.0)) as pool:
            reports = pool.run_units(todo)
            next(reports)
            clock, processor = time.monotonic(), time.process_time()
            found = 1 + sum(1 for _ in reports)
            clock, processor = time.monotonic() - clock, time.process_time() - processor
        assert found == units
        each = {"clock_ms": round(1000 * clock / units, 3), "processor_ms": round(1000 * processor / units, 3)}
        lines.append({"units": units, **each})
    return lines


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


def main() -> None:
    """Measure, print, and store a full run."""
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    with tempfile.TemporaryDirectory(prefix="coldstill-scale-") as name:
        folder = Path(name)
        disk = on_disk(folder, sizes=[1_000, 20_000] if quick else [1_000, 10_000, 100_000, 1_000_000])
        store = on_object_store(folder, units=1_501 if quick else 10_001)
        workers = with_workers(folder, counts=[1, 2] if quick else [1, 2, 4, 8, 16])
        units = dispatch(folder, sizes=[1_000, 3_000] if quick else [1_000, 10_000, 100_000])
        # Report before the folder is removed: removing a million files takes minutes.
        _report(disk, store, workers, units, quick=quick)
    if broken := broken_laws(disk, store, units):
        raise SystemExit("benchmark failed: " + "; ".join(broken))


def _report(disk: Lines, store: dict[str, Any], workers: Lines, units: Lines, *, quick: bool) -> None:
    console = Console(width=None if Console().is_terminal else 120)
    print_lines("planning and resuming, local disk", disk, console)
    print_lines("a start on an object store", [store], console)
    print_lines(f"workers whose engines sleep {SLEEP_S:g} s per unit", workers, console)
    print_lines("the driver's time per unit", units, console)
    document = {"disk": disk, "object_store": store, "workers": workers, "dispatch": units}
    finish("scale", document, command="make bench-scale", quick=quick)


if __name__ == "__main__":
    main()
