"""Joins or starts a Ray cluster, and computes what a worker reserves there."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import ray

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import ClusterTooSmall

_PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")


def join_cluster(config: CaptureConfig) -> float:
    """Join the cluster that the settings or RAY_ADDRESS name, or start one on this machine. The GPUs per worker.

    Raises `ClusterTooSmall` if this machine alone could never run `cluster.min_workers`.
    """
    is_local = config.cluster.address is None and "RAY_ADDRESS" not in os.environ
    ray.init(
        # Without an address, Ray would join any cluster that was started on this machine before.
        address="local" if is_local else config.cluster.address,
        include_dashboard=False if is_local else None,
        # Ray's warnings about a cluster that only this capture uses (token, dashboard) do not concern the user.
        logging_level=logging.ERROR if is_local else logging.WARNING,
        log_to_driver=False,
    )
    resources = ray.cluster_resources()
    gpus = gpus_per_worker(config, resources)
    if is_local:
        try:
            require_room(config, resources, gpus=gpus)
        except ClusterTooSmall:
            ray.shutdown()
            raise
    return gpus


def gpus_per_worker(config: CaptureConfig, resources: Mapping[str, float]) -> float:
    """GPUs that Ray reserves for a worker: as set, or else those that its engine needs, if the cluster has any."""
    if config.cluster.gpus_per_worker is not None:
        return config.cluster.gpus_per_worker
    if config.teacher.engine == "endpoint" or not resources.get("GPU"):
        return 0
    gpus = 1
    for name in _PARALLEL_SIZES:
        gpus *= int(config.teacher.engine_args.get(name, 1))
    return gpus


def require_room(config: CaptureConfig, resources: Mapping[str, float], *, gpus: float) -> None:
    """Raise `ClusterTooSmall` if `resources`, the total of this machine, cannot hold `cluster.min_workers`."""
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
