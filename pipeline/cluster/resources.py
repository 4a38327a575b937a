"""What a worker asks of Ray. Settings and the cluster's resources in, numbers or a named error out."""

from __future__ import annotations

from collections.abc import Mapping

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import ClusterTooSmall

_PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")


def gpus_per_worker(config: CaptureConfig, resources: Mapping[str, float]) -> float:
    """GPUs that Ray reserves for a worker: as set, else what its engine takes where the cluster has any."""
    if config.cluster.gpus_per_worker is not None:
        return config.cluster.gpus_per_worker
    if config.teacher.engine == "endpoint" or not resources.get("GPU"):
        return 0
    gpus = 1
    for name in _PARALLEL_SIZES:
        gpus *= int(config.teacher.engine_args.get(name, 1))
    return gpus


def require_room(config: CaptureConfig, resources: Mapping[str, float], *, gpus: float) -> None:
    """Raise `ClusterTooSmall` where the workers that the run waits for can never start: this machine will not grow."""
    workers = config.cluster.min_workers
    for key, name, wanted in (
        ("cpus_per_worker", "CPU", config.cluster.cpus_per_worker),
        ("gpus_per_worker", "GPU", gpus),
    ):
        found = resources.get(name, 0)
        if wanted * workers > found:
            key = key if wanted > found else "min_workers"
            raise ClusterTooSmall(
                f"cluster.{key}",
                found=f"{found:g} {name}s on this machine",
                wanted=f"{wanted:g} for each of {workers} workers",
                fix=f"lower cluster.{key}, or join a cluster with cluster.address or RAY_ADDRESS",
            )
