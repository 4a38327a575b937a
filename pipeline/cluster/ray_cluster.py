"""The Ray cluster of a capture: join or start it, size its workers, report a missing node, show metrics.

The counters and gauges are for Ray's dashboard and Prometheus.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence

import ray
from ray.util.metrics import Counter, Gauge

from coldstill.common.interrupts import Interrupted, keeping_handlers
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import ClusterTooSmall, ClusterUnreachable
from coldstill.pipeline.worker import UnitReport

_NEEDS = {"cpus_per_worker": "CPU", "gpus_per_worker": "GPU"}
"""Settings of a worker's needs, and Ray's names of the resources; `join_cluster` fills both in."""
START_LIMITS = ("RAY_gcs_server_port_wait_time_s", "RAY_raylet_start_wait_time_s")
"""Ray's own environment variables for how long the parts of a new node may take to start."""
_FIRST_REPORT_S = 60.0
_MAX_NODES = 8
_MAX_REASON_CHARS = 400
_MAX_REASON_HEAD = 150
_ANSI_CODE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_COUNTED = ("rows", "rejected", "tokens", "targets", "bytes")

log = logging.getLogger(__name__)


def join_cluster(config: CaptureConfig) -> CaptureConfig:
    """Join the cluster that the settings or RAY_ADDRESS name, or start one on this machine.

    Returns the settings with the CPUs and GPUs of a worker filled in.

    Raises `ClusterUnreachable`, and `ClusterTooSmall` if this machine alone could never run `cluster.min_workers`.
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
        except Exception as error:  # Ray raises plain RuntimeError and Exception, among others
            ray.shutdown()
            raise _unreachable(config.cluster.address, error, is_local=is_local) from error
    resources = ray.cluster_resources()
    gpus = gpus_per_worker(config, resources)
    cpus = cpus_per_worker(config, resources, is_local=is_local)
    needs = {"gpus_per_worker": gpus, "cpus_per_worker": cpus}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=needs)})
    if is_local:
        try:
            require_room(config, resources)
        except ClusterTooSmall:
            ray.shutdown()
            raise
    return config


def _unreachable(address: str | None, error: Exception, *, is_local: bool) -> ClusterUnreachable:
    found = f"{type(error).__name__}: {plain_reason(str(error))}"
    if is_local:
        limits = " ".join(f"{name}=600" for name in START_LIMITS)
        return ClusterUnreachable(
            "Ray on this machine",
            found=found,
            wanted="a Ray node that starts within Ray's time limits",
            fix=f"run again while the machine is less busy, or with longer limits: {limits} coldstill ...",
        )
    return ClusterUnreachable(
        "cluster.address" if address else "RAY_ADDRESS",
        found=f"{address or os.environ['RAY_ADDRESS']}: {found}",
        wanted="the address of a running Ray cluster",
        fix="correct the address, or leave both out to start Ray on this machine",
    )


def plain_reason(text: str) -> str:
    """`text` on one line of at most 400 characters, without terminal codes. The end stays: it names the cause."""
    line = " ".join(without_codes(text).split())
    if len(line) <= _MAX_REASON_CHARS:
        return line
    head = line[:_MAX_REASON_HEAD] + " ... "
    return head + line[len(head) - _MAX_REASON_CHARS :]


def without_codes(text: str) -> str:
    """`text` without terminal codes. Ray colors the first line of a traceback."""
    return _ANSI_CODE.sub("", text)


def gpus_per_worker(config: CaptureConfig, resources: Mapping[str, float]) -> float:
    """GPUs that Ray reserves for a worker: as set, or else those that its engine needs, if the cluster has any."""
    if config.cluster.gpus_per_worker is not None:
        return config.cluster.gpus_per_worker
    if config.teacher.engine == "endpoint" or not resources.get("GPU"):
        return 0
    return config.teacher.devices


def cpus_per_worker(config: CaptureConfig, resources: Mapping[str, float], *, is_local: bool) -> float:
    """CPUs that Ray reserves for a worker: as set, or else its share of a machine without a GPU, elsewhere 1.

    An engine on a GPU needs one thread, and on another's cluster one core is what anybody may take unasked.
    """
    if config.cluster.cpus_per_worker is not None:
        return config.cluster.cpus_per_worker
    if not is_local or resources.get("GPU") or config.teacher.engine == "endpoint":
        return 1
    return max(1, int(resources.get("CPU", 1) // config.cluster.max_workers))


def require_room(config: CaptureConfig, resources: Mapping[str, float]) -> None:
    """Raise `ClusterTooSmall` if `resources`, the total of this machine, cannot hold `cluster.min_workers`."""
    workers = config.cluster.min_workers
    for key, name in _NEEDS.items():
        found, wanted = resources.get(name, 0), getattr(config.cluster, key)
        if wanted * workers > found:
            key = key if wanted > found else "min_workers"
            raise ClusterTooSmall(
                f"cluster.{key}",
                found=f"{found:g} {name}s on this machine",
                wanted=f"{wanted:g} for each of {workers} workers",
                fix=f"lower cluster.{key}, or join a cluster with cluster.address or RAY_ADDRESS",
            )


class PlacementReport:
    """Reports workers that the nodes of the cluster cannot hold: after a minute, then at doubling intervals.

    Raises nothing, because an autoscaler may still add nodes.
    """

    def __init__(self, config: CaptureConfig):
        self._config = config
        self.begin()

    def begin(self) -> None:
        """Start to count from now."""
        self._since, self._interval = time.monotonic(), _FIRST_REPORT_S

    def update(self, *, ready: int, wanted: int) -> None:
        """Log a report if it is due. `ready`: workers that run; `wanted`: those without which no unit is assigned."""
        if ready >= wanted:
            self.begin()
        elif time.monotonic() - self._since >= self._interval:
            self._interval *= 2
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            if text := missing_room(self._config, nodes, wanted=wanted):
                log.warning("%s", text)


def missing_room(config: CaptureConfig, nodes: Sequence[Mapping[str, float]], *, wanted: int) -> str:
    """Why nodes with these resources in total cannot hold `wanted` workers; empty if they can."""
    needs = {name: getattr(config.cluster, key) for key, name in _NEEDS.items()}
    room = [min(int(node.get(name, 0) / need + 1e-9) for name, need in needs.items() if need) for node in nodes]
    if sum(room) >= wanted:
        return ""
    has = "; ".join(", ".join(f"{node.get(name, 0):g} {name}s" for name in needs) for node in nodes[:_MAX_NODES])
    more = f"; and {len(nodes) - _MAX_NODES} more nodes" if len(nodes) > _MAX_NODES else ""
    keys = "cluster.cpus_per_worker, cluster.gpus_per_worker" + (" or cluster.min_workers" if sum(room) else "")
    return (
        f"waiting for Ray: the capture needs {wanted} worker{'s' if wanted > 1 else ''} with {needs['CPU']:g} CPUs and "
        f"{needs['GPU']:g} GPUs each, and the cluster has room for {sum(room)}: {has or 'no node'}{more}. Unless an "
        f"autoscaler adds nodes, this will not end: lower {keys}, or add nodes"
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
