"""Records the progress of a running capture, for `coldstill status` and the progress bar.

The record is one small file below `progress/`, replaced every few seconds. No other part of a capture depends on it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import NamedTuple, Protocol

from coldstill.common.clock import ends_about, local_now
from coldstill.common.progress import tqdm
from coldstill.pipeline.errors import CaptureIncomplete
from coldstill.pipeline.worker import UnitReport
from coldstill.storage_schema.errors import StorageFailed
from coldstill.storage_schema.store import Store

from .status import MAX_LISTED, PROGRESS_FOLDER, Failure, ProgressRecord, RecordState, Totals, read_records, record_name

_WRITE_EVERY_S = 10
_MAX_FOLDED = 100
_MIN_RATE_S = 1.0
"""Rates are not computed over a shorter time."""
_RATE_WINDOW_S = 600
"""Rates cover the last ten minutes, because the number of workers changes."""

_STATES: dict[type[BaseException], RecordState] = {
    CaptureIncomplete: "incomplete",
    KeyboardInterrupt: "interrupted",
    SystemExit: "interrupted",
}


class Failed(Protocol):
    """A unit that was given up."""

    @property
    def unit(self) -> int:
        """The number of the unit."""
        ...

    @property
    def reason(self) -> str:
        """Why."""
        ...


class Work(Protocol):
    """The facts about the workers that the record reads (`cluster.pool.WorkerPool`)."""

    @property
    def workers(self) -> int:
        """Workers that are ready now."""
        ...

    @property
    def gpus_per_worker(self) -> float:
        """GPUs that each worker holds."""
        ...

    @property
    def running(self) -> Mapping[int, str]:
        """Units in progress, and the names of their workers."""
        ...

    @property
    def failed(self) -> Sequence[Failed]:
        """Units that were given up."""
        ...


class Rates(NamedTuple):
    """Rates per second of all workers, in the last ten minutes; `rows` are those of the source."""

    rows: float
    tokens: float
    targets: float


class _Moment(NamedTuple):
    """When a unit ended, and the totals at that time."""

    seconds: float
    done: Totals


class Progress:
    """Writes the record of this start while a `with` block lasts, and how the block ended.

    A thread adds up worker time each second and writes the record each `_WRITE_EVERY_S` seconds. When a write fails,
    the next one replaces it; a `RetryingStore` retries only the first and the last record of a capture that succeeded.
    """

    def __init__(self, store: Store, *, token: str, work: Work, price_per_gpu_hour: float | None = None):
        self.on_second: Callable[[], None] | None = None
        """Called each second by that thread."""
        self._store, self._unretried = store, Store(store.url)
        self._token, self._work, self._price = token, work, price_per_gpu_hour
        self._started = time.time()
        self._lock = threading.Lock()
        self._own = Totals(starts=1)
        self._worker_seconds = self._gpu_seconds = 0.0
        self._counted_until = time.monotonic()
        self._moments: deque[_Moment] = deque()
        self._earlier: Totals | None = None
        self._folded: tuple[str, ...] = ()
        self._score_seconds: float | None = None
        self._rejected: Counter[str] = Counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._thread.join()
        state: RecordState = "sealed"
        if kind is not None:
            state = next((state for error, state in _STATES.items() if issubclass(kind, error)), "stopped")
        text = f"{kind.__name__}: {error}" if kind and state == "stopped" else None
        with suppress(StorageFailed):  # must not hide the error that ended the block, or delay it
            self.write(state, error=text, store=self._store if kind is None else None)

    def begin(self) -> None:
        """Add up the earlier starts and write the first record. Before this call, nothing is written; a second call
        does nothing. Raises `StorageFailed`.
        """
        if self._earlier is not None:
            return
        stored = [f"{PROGRESS_FOLDER}/{name}" for name in self._store.names(PROGRESS_FOLDER)]  # damaged ones too
        records = read_records(self._store)
        inner = {token for record in records for token in record.folded}
        # Records already removed count too: a driver that was suspended may write its own once more.
        present = [record.token for record in records]
        self._folded = tuple(dict.fromkeys([*present, *(token for record in records for token in record.folded)]))
        self._folded = self._folded[:_MAX_FOLDED]
        newest = [record for record in records if record.token not in inner]
        self._earlier = sum((record.totals for record in newest), start=Totals())
        for record in newest:
            self._rejected.update(record.rejected)
        self.write(store=self._store)
        for path in stored:
            if path.endswith(".json"):
                self._store.delete(path)

    def add(self, report: UnitReport, *, source_rows: int) -> None:
        """Count a committed unit of `source_rows`. Its shard may have more rows, as of several answers, or fewer,
        as of joined documents."""
        with self._lock:
            self._count_workers()
            self._own += Totals(
                units=1,
                rows=source_rows,
                tokens=report.tokens,
                targets=report.targets,
                bytes=report.bytes,
            )
            self._rejected.update(report.reasons)
            now = time.monotonic()
            self._moments.append(_Moment(now, self._own))
            while len(self._moments) > 2 and self._moments[1].seconds < now - _RATE_WINDOW_S:
                self._moments.popleft()

    def sealed(self, *, score_seconds: float, rejected: dict[str, int]) -> None:
        """Note that the dataset is sealed, how long its teachers scored in total, and the rejects by reason."""
        self._score_seconds, self._rejected = score_seconds, Counter(rejected)

    def write(self, state: RecordState = "running", *, error: str | None = None, store: Store | None = None) -> None:
        """Replace the record, without retries unless a `store` has them; does nothing before `begin`.

        Raises `StorageFailed`.
        """
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
            running={} if is_over else dict(list(self._work.running.items())[:MAX_LISTED]),
            failed=tuple(Failure(unit=one.unit, reason=one.reason) for one in failed[:MAX_LISTED]),
            failed_units=len(failed),
            tokens_per_s=rates.tokens if rates else None,
            rows_per_s=rates.rows if rates else None,
            score_seconds=self._score_seconds,
            rejected=dict(self._rejected),
        )
        # A record without rejects is one that a driver of an earlier release reads too.
        unknown_before = None if record.rejected else {"rejected"}
        (store or self._unretried).put(
            record_name(self._token), (record.model_dump_json(indent=2, exclude=unknown_before) + "\n").encode()
        )

    @property
    def totals(self) -> Totals:
        """Totals of this start and, after `begin`, of the earlier ones."""
        with self._lock:
            return self._measured() + (self._earlier or Totals())

    @property
    def rates(self) -> Rates | None:
        """None until the first unit ended and a second has passed."""
        with self._lock:
            if len(self._moments) < 2:
                return None
            first, last = self._moments[0], self._moments[-1]
            seconds = time.monotonic() - first.seconds
            if seconds < _MIN_RATE_S:
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
        if (
            self._work.workers and not self._moments
        ):  # from the first ready worker, so that engine starts do not lower the rate
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


class ProgressBar:
    """The driver's progress bar: rows, with speed, end, workers, failures and cost. Refreshed each second."""

    def __init__(
        self,
        progress: Progress,
        *,
        work: Work,
        rows: int,
        rows_done: int,
        now: Callable[[], datetime] = local_now,
    ):
        self._progress, self._work, self._now = progress, work, now
        self._bar = tqdm(total=rows, initial=rows_done, desc="capture", unit=" rows", smoothing=0)
        self._has_begun = False

    def __enter__(self) -> ProgressBar:
        self._progress.on_second = self._refresh
        self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.on_second = None
        self._refresh(is_over=True)
        self._bar.close()

    def add(self, source_rows: int) -> None:
        """Count the rows of a committed unit."""
        self._bar.update(source_rows)
        self._refresh()

    def _refresh(self, *, is_over: bool = False) -> None:
        if self._work.workers and not self._has_begun:
            self._has_begun = True
            self._bar.unpause()  # engine starts do not count in the time estimate
        self._bar.set_postfix_str(self._text(is_over=is_over))

    def _text(self, *, is_over: bool = False) -> str:
        if not self._has_begun:
            return "starting workers"
        rates, totals, failed = self._progress.rates, self._progress.totals, len(self._work.failed)
        parts = [f"{rates.targets:,.0f} targets/s"] if rates else []
        if not is_over and rates and rates.rows and (rows := (self._bar.total or 0) - self._bar.n) > 0:
            parts.append(f"ends {ends_about(rows / rates.rows, now=self._now())}")
        parts.append(f"workers: {self._work.workers}")
        parts += [f"failed: {failed}"] if failed else []
        parts += [f"cost: {totals.cost:,.2f}"] if totals.cost is not None else []
        return ", ".join(parts)
