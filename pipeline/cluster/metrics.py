"""What Ray's dashboard shows of a capture, by way of Prometheus. Reports of units in; nothing comes out here."""

from __future__ import annotations

import threading
import time

from ray.util.metrics import Counter, Gauge

from coldstill.pipeline.units.worker import UnitReport

_COUNTED = ("rows", "rejected", "tokens", "targets", "bytes")


class WorkerMetrics:
    """Counters and the speed of one worker. Threads may share it."""

    def __init__(self, worker: str):
        self._tags = {"worker": worker}
        self._counters = {name: _counter(name) for name in ("units", *_COUNTED)}
        self._speed = Gauge("coldstill_tokens_per_s", description="Tokens committed per second.", tag_keys=("worker",))
        self._turn = threading.Lock()
        self._last = time.monotonic()

    def count(self, report: UnitReport) -> None:
        """A unit was committed. Its speed is over the time since the one before: units overlap."""
        with self._turn:
            now = time.monotonic()
            seconds, self._last = now - self._last, now
        self._counters["units"].inc(1, self._tags)
        for name in _COUNTED:
            if amount := getattr(report, name):  # Ray refuses to add nothing
                self._counters[name].inc(amount, self._tags)
        self._speed.set(report.tokens / max(seconds, 1e-9), self._tags)


class DriverMetrics:
    """How many workers there are."""

    def __init__(self) -> None:
        self._workers = Gauge("coldstill_workers", description="Workers of the capture.", tag_keys=("state",))

    def show(self, *, ready: int, starting: int) -> None:
        """Workers now."""
        self._workers.set(ready, {"state": "ready"})
        self._workers.set(starting, {"state": "starting"})


def _counter(name: str) -> Counter:
    return Counter(f"coldstill_{name}", description=f"{name.capitalize()} of committed units.", tag_keys=("worker",))
