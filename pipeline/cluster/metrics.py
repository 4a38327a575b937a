"""Counters and gauges of a capture for Ray's dashboard and Prometheus."""

from __future__ import annotations

import threading
import time

from ray.util.metrics import Counter, Gauge

from coldstill.pipeline.worker import UnitReport

_COUNTED = ("rows", "rejected", "tokens", "targets", "bytes")


class WorkerMetrics:
    """Counters and the speed of one worker. Safe to share between threads."""

    def __init__(self, worker: str):
        self._tags = {"worker": worker}
        self._counters = {name: _counter(name) for name in ("units", *_COUNTED)}
        self._speed = Gauge("coldstill_tokens_per_s", description="Tokens committed per second.", tag_keys=("worker",))
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def count(self, report: UnitReport) -> None:
        """Add a committed unit. Its speed is over the time since the unit before, because units overlap."""
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
