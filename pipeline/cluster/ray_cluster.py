"""The Ray cluster of a capture: join or start it, size its workers, show metrics.

The counters and gauges are for Ray's dashboard and Prometheus.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping

import ray
from ray.util.metrics import Counter, Gauge

from coldstill.common.interrupts import Interrupted, keeping_handlers
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import ClusterTooSmall
from coldstill.pipeline.worker import UnitReport

_PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
_COUNTED = ("rows", "rejected", "tokens", "targets", "bytes")


def join_cluster(config: CaptureConfig) -> float:
    """Join the cluster that the settings or RAY_ADDRESS name, or start one on this machine. The GPUs per worker.

    Raises `ClusterTooSmall` if this machine alone could never run `cluster.min_workers`.
    """
    is_local = config.cluster.address is None and "RAY_ADDRESS" not in os.environ
    with keeping_handlers():  # Ray sets one that ends the driver with the native stacks of all threads
        try:
            ray.init(
                # Without an address, Ray would join any cluster that was started on this machine before.
                address="local" if is_local else config.cluster.address,
                include_dashboard=False if is_local else None,
                # Ray's warnings about a cluster that only this capture uses (token, dashboard) do not concern the user.
                logging_level=logging.ERROR if is_local else logging.WARNING,
                log_to_driver=False,
            )
        except SystemExit:  # Ray's own handler of SIGTERM, while it starts
            raise Interrupted(signal.SIGTERM) from None
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


class WorkerMetrics:
    """Counters and the speed of one worker. Safe to share between threads."""

    def __init__(self, worker: str):
        self._tags = {"worker": worker}
        self._counters = {name: _counter(name) for name in ("units", *_COUNTED)}
        self._speed = Gauge("coldstill_tokens_per_s", description="Tokens committed per second.", tag_keys=("worker",))
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def count(self, report: UnitReport) -> None:
        """Add a committed unit. Its speed is measured since the previous unit, because units overlap."""
        with self._lock:
            now = time.monotonic()
            seconds, self._last = now - self._last, now
        self._counters["units"].inc(1, self._tags)
        for name in _COUNTED:
            if amount := getattr(report, name):  # Ray raises when 0 is added
                self._counters[name].inc(amount, self._tags)
        self._speed.set(report.tokens / max(seconds, 1e-9), self._tags)


class DriverMetrics:
    """The number of workers."""

    def __init__(self) -> None:
        self._workers = Gauge("coldstill_workers", description="Workers of the capture.", tag_keys=("state",))

    def show(self, *, ready: int, starting: int) -> None:
        """Set the numbers of workers."""
        self._workers.set(ready, {"state": "ready"})
        self._workers.set(starting, {"state": "starting"})


def _counter(name: str) -> Counter:
    return Counter(f"coldstill_{name}", description=f"{name.capitalize()} of committed units.", tag_keys=("worker",))
