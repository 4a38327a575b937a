"""Helpers of the pool tests: run a capture's units on workers with a faulty teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstill.pipeline.cluster.dispatcher import FailedUnit
from coldstill.pipeline.cluster.pool import WorkerPool
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.worker import CaptureWorker, UnitReport
from coldstill.storage_schema.commits import committed_units, read_commit
from coldstill.storage_schema.store import Store
from tests.pipeline.capturing import capture_config, contents

from .faulty import Faults

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


class Outcome(NamedTuple):
    """The result of a run: `reports` by unit, and the units that `failed`."""

    reports: dict[int, UnitReport]
    failed: list[FailedUnit]


def new_cluster(*, num_cpus: int) -> Cluster:
    """A cluster of one node. Ray gives it 30 s to start, which is short on a busy machine: three tries."""
    from ray.cluster_utils import Cluster

    for tries_left in (2, 1, 0):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=num_cpus, include_dashboard=False)
        except Exception:
            cluster.shutdown()
            if not tries_left:
                raise
        else:
            return cluster
    raise AssertionError("the last try returns or raises")


def cluster_config(folder: Path, address: str, *, rows: int = 40, **changes: Any) -> CaptureConfig:
    """A capture on a shared cluster, without a calibration pass and without draws: the faulty teacher has none."""
    cluster = {"address": address, "cpus_per_worker": 1, "store_retry_s": 20, **changes.pop("cluster", {})}
    teacher = {"draws": 0, "top_k": 4, **changes.pop("teacher", {})}
    return capture_config(folder, rows=rows, calibration_targets=0, cluster=cluster, teacher=teacher, **changes)


def faults(folder: Path, **kinds: Any) -> Faults:
    """These faults; `folder` holds the marks of those that have happened."""
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    return Faults(folder=str(marks), **kinds)


def run(config: CaptureConfig, load: Faults) -> Outcome:
    """Run all units that are not committed."""
    prepared = prepare(config)
    done = committed_units(prepared.store)
    with WorkerPool(config, load=load) as pool:
        todo = [unit.index for unit in prepared.units if unit.index not in done]
        reports = {report.unit: report for report in pool.run_units(todo)}
    return Outcome(reports, pool.failed)


def unbroken(folder: Path, **changes: Any) -> dict[str, str]:
    """Digests of the shards of the same capture by one worker in this process, without faults."""
    config = cluster_config(folder, "", output="unbroken", **changes)
    prepared = prepare(config)
    worker = CaptureWorker(config, faults(folder)(config.teacher, prepared.header, None))
    for unit in prepared.units:
        worker.run(unit.index)
    return contents(config.output)


def rejects(config: CaptureConfig) -> Iterator[dict[str, Any]]:
    """All rejects, by unit."""
    store = Store(config.output)
    for unit in sorted(committed_units(store)):
        if file := read_commit(store, unit).rejects:
            yield from map(json.loads, store.read(file.name).splitlines())
