"""Laws of a cluster whose nodes join and leave: real Ray nodes, the teacher is a fake."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray
from ray.exceptions import RayTaskError

from coldstill.pipeline.cluster import ray_cluster
from coldstill.pipeline.cluster.pool import WorkerPool, _named
from coldstill.pipeline.cluster.ray_cluster import (
    START_LIMITS,
    PlacementReport,
    cpus_per_worker,
    gpus_per_worker,
    join_cluster,
    missing_room,
    plain_reason,
    require_room,
)
from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import ClusterTooSmall, ClusterUnreachable
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.commits import committed_units
from coldstill.storage_schema.store import Store
from tests.pipeline.capturing import capture_config, contents

from .running import cluster_config, faults, new_cluster, unbroken

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def empty_cluster() -> Iterator[Cluster]:
    """A head node that can run no worker."""
    cluster = new_cluster(num_cpus=0)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_that_joins_gets_units_and_the_units_of_one_that_is_lost_are_done_elsewhere(
    tmp_path: Path, empty_cluster: Cluster
) -> None:
    config = cluster_config(tmp_path, empty_cluster.address, rows=199, cluster={"max_workers": 2})
    first = empty_cluster.add_node(num_cpus=1)
    units = [unit.index for unit in prepare(config).units]
    names: set[str] = set()
    with WorkerPool(config, load=faults(tmp_path, seconds=1.5)) as pool:
        for number, _ in enumerate(pool.run_units(units)):
            names |= set(pool.running.values())
            if number == 0:
                assert pool.workers == 1
                empty_cluster.add_node(num_cpus=1)
            if pool.workers == 2 and first is not None:
                empty_cluster.remove_node(first, allow_graceful=False)
                first = None
        assert pool.failed == []
    assert first is None, "the second node's worker came too late to prove anything"
    assert {"worker-0", "worker-1"} <= names
    assert committed_units(Store(config.output)) == set(units)
    assert contents(config.output) == unbroken(tmp_path, rows=199)


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({}, 1),
        ({"engine_args": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}}, 8),
        ({"engine": "endpoint", "endpoint": "http://host/v1"}, 0),
        ({"engine": "transformers"}, 1),
    ],
)
def test_a_worker_gets_the_gpus_that_its_engine_takes_where_there_are_any(
    tmp_path: Path, settings: dict, gpus: int
) -> None:
    config = capture_config(tmp_path).model_copy(update={"teacher": TeacherConfig(model="m", **settings)})
    assert gpus_per_worker(config, {"CPU": 8, "GPU": 8}) == gpus
    assert gpus_per_worker(config, {"CPU": 8}) == 0
    fixed = _with(config, gpus_per_worker=0.5)
    assert gpus_per_worker(fixed, {"CPU": 8}) == 0.5


def test_a_machine_that_can_never_hold_min_workers_is_refused(tmp_path: Path) -> None:
    config = _with(capture_config(tmp_path), min_workers=3, max_workers=3, cpus_per_worker=2, gpus_per_worker=0)
    require_room(config, {"CPU": 6})
    with pytest.raises(ClusterTooSmall, match=r"cluster\.min_workers"):
        require_room(config, {"CPU": 5})
    with pytest.raises(ClusterTooSmall, match=r"cluster\.gpus_per_worker"):
        require_room(_with(config, gpus_per_worker=1), {"CPU": 6})


@pytest.mark.parametrize(
    ("settings", "resources", "is_local", "cpus"),
    [
        ({}, {"CPU": 8}, True, 8),
        ({"max_workers": 3}, {"CPU": 8}, True, 2),
        ({"max_workers": 9}, {"CPU": 8}, True, 1),
        ({}, {"CPU": 8, "GPU": 1}, True, 1),
        ({}, {"CPU": 8}, False, 1),
        ({"cpus_per_worker": 0.5}, {"CPU": 8}, True, 0.5),
    ],
)
def test_the_workers_of_a_machine_without_a_gpu_share_its_cores(
    tmp_path: Path, settings: dict, resources: dict, is_local: bool, cpus: float
) -> None:
    config = _with(capture_config(tmp_path), **{"cpus_per_worker": None, **settings})
    assert cpus_per_worker(config, resources, is_local=is_local) == cpus


NODES = [{"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("changes", "gpus", "wanted", "words"),
    [
        ({}, 0, 10, ()),
        ({"cpus_per_worker": 0.1}, 0, 100, ()),
        ({}, 1, 1, ()),
        ({}, 2, 1, ("1 worker with 1 CPUs and 2 GPUs", "room for 0: 8 CPUs, 0 GPUs; 2 CPUs, 1 GPUs.")),
        ({"cpus_per_worker": 9}, 0, 1, ("9 CPUs and 0 GPUs", "room for 0", "lower cluster.cpus_per_worker")),
        ({"min_workers": 3, "max_workers": 3}, 1, 3, ("3 workers", "room for 1", "or cluster.min_workers")),
    ],
)
def test_workers_that_no_node_can_hold_are_told_with_what_the_cluster_has_and_the_settings(
    tmp_path: Path, changes: dict, gpus: float, wanted: int, words: tuple[str, ...]
) -> None:
    config = _with(capture_config(tmp_path), **{"cpus_per_worker": 1, "gpus_per_worker": gpus, **changes})
    text = missing_room(config, NODES, wanted=wanted)
    assert bool(text) == bool(words)
    for part in words:
        assert part in text


def test_a_worker_without_room_is_reported_after_a_minute_and_then_at_doubling_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: now)
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    report = PlacementReport(_with(capture_config(tmp_path), cpus_per_worker=4, gpus_per_worker=0))
    when = []
    for _ in range(600):
        report.update(ready=0, wanted=1)
        if len(caplog.messages) > len(when):
            when.append(now - 1000)
        now += 1
    assert when == [60, 120, 240, 480]
    report.update(ready=1, wanted=1)
    now += 59
    report.update(ready=0, wanted=1)
    assert len(caplog.messages) == 4, "a worker that ran starts the count anew"


@pytest.mark.slow
def test_a_capture_that_no_node_can_run_reports_it_and_goes_on_when_nodes_join(
    tmp_path: Path, empty_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_FIRST_REPORT_S", 2.0)
    told: list[str] = []

    class Autoscaler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            empty_cluster.add_node(num_cpus=1)

    handler = Autoscaler()
    ray_cluster.log.addHandler(handler)
    workers = {"min_workers": 2, "max_workers": 2}
    config = cluster_config(tmp_path, empty_cluster.address, rows=20, cluster=workers)
    prepared = prepare(config)
    try:
        with WorkerPool(config, load=faults(tmp_path)) as pool:
            assert pool.calibrate(prepared.header, prepared.units[0])
            assert len(list(pool.run_units([unit.index for unit in prepared.units]))) == len(prepared.units)
    finally:
        ray_cluster.log.removeHandler(handler)
    assert len(told) == 2
    assert "needs 1 worker " in told[0]
    assert "room for 0" in told[0]
    assert "needs 2 workers" in told[1]
    assert "room for 1" in told[1]


def test_a_local_ray_that_does_not_start_in_time_is_named_with_the_limits_that_lengthen_it(tmp_path: Path) -> None:
    """Ray's own limit of 30 s is set to 0. In a process of its own: Ray starts there."""
    program = (
        "import sys; from coldstill.pipeline.cluster.ray_cluster import join_cluster\n"
        "from coldstill.pipeline.config import CaptureConfig\n"
        "config = {'output': 'o', 'source': {'path': 'x.jsonl'}, 'teacher': {'model': 'm'}}\n"
        "try: join_cluster(CaptureConfig.model_validate(config))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, START_LIMITS[0]: "0"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.startswith("ClusterUnreachable Ray on this machine\n  found:  RuntimeError: Timed out"), done
    for name in START_LIMITS:
        assert f"{name}=600" in done.stdout


def test_ray_still_reads_the_limits_that_the_error_names() -> None:
    """They are not in Ray's documentation."""
    folder = Path(ray.__file__).parent
    assert START_LIMITS[0] in (folder / "_private/node.py").read_text()
    assert START_LIMITS[1].encode() in (folder / "_raylet.so").read_bytes()


def test_an_address_without_a_cluster_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError("Failed to connect to\x1b[31m GCS\x1b[39m")

    monkeypatch.setattr(ray_cluster.ray, "init", refuse)
    with pytest.raises(ClusterUnreachable, match=r"cluster\.address\n  found:  host:1: ConnectionError: .* GCS\n"):
        join_cluster(_with(capture_config(tmp_path), address="host:1"))


def test_what_ray_reports_of_a_death_keeps_its_end_and_loses_its_terminal_codes() -> None:
    text = (
        "\x1b[36mray::Worker\x1b[39m\n"
        + "  File somewhere\n" * 100
        + "ImportError: \x1b[1mlibcuda.so\x1b[0m is missing"
    )
    reason = plain_reason(text)
    assert reason.startswith("ray::Worker File somewhere")
    assert reason.endswith("File somewhere ImportError: libcuda.so is missing")
    assert len(reason) == 400
    assert plain_reason("a  short\n\x1b[31mreason") == "a short reason"
    assert _named("unit 3", _TaskError("\x1b[36mray::run()\x1b[39m\nKeyError")).found == "ray::run()\nKeyError"


class _TaskError(RayTaskError):
    """As raised by a worker."""

    def __init__(self, text: str):
        self._text, self.cause = text, KeyError()

    def __str__(self) -> str:
        return self._text


def _with(config: CaptureConfig, **changes: object) -> CaptureConfig:
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=changes)})
