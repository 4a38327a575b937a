"""What `benchmarks.scale` measures: a start on a disk, one on an object store, busy workers, and time per unit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.scale.captures import new_capture, pretend_committed, record_of
from benchmarks.scale.teacher import Sleeping
from coldstill.pipeline.capture import remaining
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.commits import commit_name

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


def with_workers(folder: Path, *, counts: list[int], sleep_s: float) -> Lines:
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
        with WorkerPool(config, load=Sleeping(sleep_s)) as pool:
            for _ in pool.run_units(todo):
                ends.append(time.monotonic())
        # All workers start together; the first end shows when that was.
        seconds = ends[-1] - ends[0] + sleep_s
        lines.append({"workers": workers, "units": units, "efficiency": round(units * sleep_s / workers / seconds, 3)})
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
