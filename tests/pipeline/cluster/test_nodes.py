"""Laws of a cluster whose nodes join and leave: real Ray nodes, the teacher is a fake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstill.pipeline.cluster.pool import WorkerPool
from coldstill.pipeline.cluster.ray_cluster import gpus_per_worker, require_room
from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import ClusterTooSmall
from coldstill.pipeline.prepare import prepare
from coldstill.storage_schema.commits import committed_units
from coldstill.storage_schema.store import Store
from tests.pipeline.capturing import capture_config, contents

from .running import cluster_config, faults, new_cluster, unbroken

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


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
    config = _with(capture_config(tmp_path), min_workers=3, max_workers=3, cpus_per_worker=2)
    require_room(config, {"CPU": 6}, gpus=0)
    with pytest.raises(ClusterTooSmall, match=r"cluster\.min_workers"):
        require_room(config, {"CPU": 5}, gpus=0)
    with pytest.raises(ClusterTooSmall, match=r"cluster\.gpus_per_worker"):
        require_room(config, {"CPU": 6}, gpus=1)


def _with(config: CaptureConfig, **changes: object) -> CaptureConfig:
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=changes)})
