"""The record of a run while it lasts: reports of units in, one small file below `progress/` out, replaced every few
seconds. It is what `coldstill status` shows from anywhere; nothing depends on it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from coldstill.pipeline.errors import CaptureIncomplete
from coldstill.pipeline.units.worker import UnitReport
from coldstill.storage_schema.errors import StorageFailed
from coldstill.storage_schema.store import Store

from .progress_record import MOST_LISTED, Failure, ProgressRecord, State, Totals, read_records, record_name

_WRITE_EVERY_S = 10
_MOST_FOLDED = 100
_SHORTEST_S = 1.0
"""No rate is told of less."""
_RATE_WINDOW_S = 600
"""Rates are those of the last ten minutes: workers come and go."""


_STATES: dict[type[BaseException], State] = {
    CaptureIncomplete: "incomplete",
    KeyboardInterrupt: "interrupted",
    SystemExit: "interrupted",  # Ray makes it of SIGTERM
}


class Failed(Protocol):
    """A unit that could not be done."""

    @property
    def unit(self) -> int:
        """Its number."""
        ...

    @property
    def reason(self) -> str:
        """Why."""
        ...


class Work(Protocol):
    """What is known of the workers (`cluster.Workforce`)."""

    @property
    def workers(self) -> int:
        """Ready now."""
        ...

    @property
    def gpus_per_worker(self) -> float:
        """GPUs that each holds."""
        ...

    @property
    def running(self) -> Mapping[int, str]:
        """Unit to worker."""
        ...

    @property
    def failed(self) -> Sequence[Failed]:
        """Units that could not be done."""
        ...


class Rates(NamedTuple):
    """Per second, of all workers, in the last ten minutes."""

    rows: float
    tokens: float
    targets: float


class _Moment(NamedTuple):
    """When a unit ended, and what had been done by then."""

    seconds: float
    done: Totals


class Progress:
    """Keeps the record of this start while a `with` block lasts; how the block ends is written there too.

    A thread counts the time of workers each second and writes each `_WRITE_EVERY_S` seconds; what the store refuses is
    written the next time.
    """

    def __init__(self, store: Store, *, token: str, work: Work, price_per_gpu_hour: float | None = None):
        self.on_second: Callable[[], None] | None = None
        """Called each second by the thread that counts."""
        self._store, self._token, self._work, self._price = store, token, work, price_per_gpu_hour
        self._started = time.time()
        self._lock = threading.Lock()
        self._own = Totals(starts=1)
        self._worker_seconds = self._gpu_seconds = 0.0
        self._counted_until = time.monotonic()
        self._moments: deque[_Moment] = deque()
        self._earlier: Totals | None = None
        self._folded: tuple[str, ...] = ()
        self._score_seconds: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._thread.join()
        state: State = "sealed"
        if kind is not None:
            state = _STATES.get(kind, "stopped")
        with suppress(StorageFailed):  # what ended the block must not be hidden
            self.write(state, error=f"{kind.__name__}: {error}" if kind and state == "stopped" else None)

    def begin(self) -> None:
        """Add up the starts before this one, and write the first record: before this, none is written.

        Raises `CommitDamaged`, `StorageFailed`.
        """
        records = read_records(self._store)
        inner = {token for record in records for token in record.folded}
        # Also those that are gone: a driver that slept may yet write its own again.
        present = [record.token for record in records]
        self._folded = tuple(dict.fromkeys([*present, *(token for record in records for token in record.folded)]))
        self._folded = self._folded[:_MOST_FOLDED]
        self._earlier = sum((record.totals for record in records if record.token not in inner), start=Totals())
        self.write()
        for record in records:
            self._store.delete(record_name(record.token))

    def add(self, report: UnitReport) -> None:
        """A unit ended."""
        with self._lock:
            self._count_workers()
            self._own += Totals(
                units=1,
                rows=report.rows + report.rejected,
                tokens=report.tokens,
                targets=report.targets,
                bytes=report.bytes,
            )
            now = time.monotonic()
            self._moments.append(_Moment(now, self._own))
            while len(self._moments) > 2 and self._moments[1].seconds < now - _RATE_WINDOW_S:
                self._moments.popleft()

    def sealed(self, *, score_seconds: float) -> None:
        """The dataset is sealed; its teachers scored for so long in all."""
        self._score_seconds = score_seconds

    def write(self, state: State = "running", *, error: str | None = None) -> None:
        """Replace the record; nothing before `begin`. Raises `StorageFailed`."""
        if self._earlier is None:
            return
        rates, is_over, failed = self.rates, state != "running", list(self._work.failed)
        with self._lock:
            self._count_workers()
            own = self._measured()
        record = ProgressRecord(
            token=self._token,
            state=state,
            error=error,
            started=self._started,
            written=time.time(),
            own=own,
            earlier=self._earlier,
            folded=self._folded,
            workers=0 if is_over else self._work.workers,
            running={} if is_over else dict(list(self._work.running.items())[:MOST_LISTED]),
            failed=tuple(Failure(unit=one.unit, reason=one.reason) for one in failed[:MOST_LISTED]),
            failed_units=len(failed),
            tokens_per_s=rates.tokens if rates else None,
            rows_per_s=rates.rows if rates else None,
            score_seconds=self._score_seconds,
        )
        self._store.put(record_name(self._token), (record.model_dump_json(indent=2) + "\n").encode())

    @property
    def totals(self) -> Totals:
        """Of this start and, once it began, of those before it."""
        with self._lock:
            return self._measured() + (self._earlier or Totals())

    @property
    def rates(self) -> Rates | None:
        """None before anything can be said."""
        with self._lock:
            if len(self._moments) < 2:
                return None
            first, last = self._moments[0], self._moments[-1]
            seconds = time.monotonic() - first.seconds
            if seconds < _SHORTEST_S:
                return None
            return Rates(*((getattr(last.done, name) - getattr(first.done, name)) / seconds for name in Rates._fields))

    def _keep(self) -> None:
        seconds = 0
        while not self._over.wait(1.0):
            seconds += 1
            with self._lock:
                self._count_workers()
            if on_second := self.on_second:
                on_second()
            if seconds % _WRITE_EVERY_S == 0:
                with suppress(StorageFailed):
                    self.write()

    def _count_workers(self) -> None:
        now = time.monotonic()
        if self._work.workers and not self._moments:  # from here on, so that the start of engines slows no rate
            self._moments.append(_Moment(now, self._own))
        seconds = self._work.workers * (now - self._counted_until)
        self._worker_seconds += seconds
        self._gpu_seconds += seconds * self._work.gpus_per_worker
        self._counted_until = now

    def _measured(self) -> Totals:
        cost = None if self._price is None else self._gpu_seconds / 3600 * self._price
        return self._own.model_copy(
            update={"worker_seconds": self._worker_seconds, "gpu_seconds": self._gpu_seconds, "cost": cost}
        )
