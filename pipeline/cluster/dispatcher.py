"""Assigns tasks to workers, and interprets the outcome of each task. Does not import Ray.

Healthy units fill all workers. The units of a worker that died are suspects. Each suspect runs isolated, alone on its
worker, so that its crash costs no healthy unit. While healthy units wait, only one worker at a time runs suspects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coldstill.common.errors import ColdstillError
from coldstill.common.processor import ProcessorUnusable
from coldstill.pipeline.errors import ImageHostFailed, SourceAdapterFailed, UnitFailed
from coldstill.pipeline.worker import UnitTask
from coldstill.storage_schema.errors import StorageFailed, TooManyMedia
from coldstill.storage_schema.plan import Unit

from .attempts import Attempts, AttemptStore, CrashReport, Trial, attempts_name
from .poison_search import next_task, search

TASKS_PER_WORKER = 2
"""The teacher scores one task while the other is read or committed."""
_ENDS_THE_RUN = (StorageFailed, TooManyMedia, SourceAdapterFailed, ImageHostFailed, ProcessorUnusable)
"""Errors that are not one unit's own."""
_FIRST_UNITS = 3
"""When this many units fail before any succeeds, the set-up is wrong, not the units."""


class FailedUnit(NamedTuple):
    """A unit that was given up, and why."""

    unit: int
    reason: str


@dataclass(eq=False)
class WorkerHandle:
    """The driver's handle of a worker. `tasks`: those in progress, by the reference that Ray returned for each."""

    name: str
    actor: Any
    crash_key: str
    """Names the worker's crash report."""
    is_ready: bool = False
    tasks: dict[Any, UnitTask] = field(default_factory=dict)


class Dispatcher:
    """The units of one run: those that wait, the suspects, those in progress, those that failed."""

    def __init__(self, todo: Sequence[int], *, plan: Sequence[Unit], attempts: AttemptStore, max_attempts: int):
        """`todo`: units that are not committed; `max_attempts`: deaths in isolation that show a row to be poison."""
        suspects = attempts.units()  # they were running when a worker died in an earlier run
        self._waiting = deque(unit for unit in todo if unit not in suspects)
        self._suspects = deque(unit for unit in todo if unit in suspects)
        self._plan, self._attempts, self._max_attempts = plan, attempts, max_attempts
        self._running: set[int] = set()
        self._isolated: set[int] = set()
        self._has_succeeded = False
        self._errors: dict[int, ColdstillError] = {}
        self.failed: list[FailedUnit] = []

    @property
    def unfinished(self) -> int:
        """Units that are neither committed nor given up."""
        return len(self._waiting) + len(self._suspects) + len(self._running)

    def assign(self, workers: Sequence[WorkerHandle]) -> Iterator[tuple[WorkerHandle, UnitTask]]:
        """Tasks for workers that are ready. The caller must start each task before it takes the next."""
        reserved = None
        while (suspect := self._next_suspect(len(workers))) is not None:
            reserved = min(workers, key=_load, default=None)
            if reserved is None or reserved.tasks:
                break  # it gets no other task until it is idle
            self._suspects.remove(suspect)
            if (task := self._isolated_task(suspect)) is not None:
                yield reserved, task
            reserved = None
        shared = [worker for worker in workers if worker is not reserved and not self._has_isolated_task(worker)]
        while self._waiting:
            worker = min(shared, key=_load, default=None)
            if worker is None or _load(worker) >= TASKS_PER_WORKER:
                return
            unit = self._waiting.popleft()
            self._running.add(unit)
            yield worker, self._planned(unit)

    def done(self, task: UnitTask, *, worker: WorkerHandle) -> None:
        """A unit is committed, or a worker survived a probe."""
        self._has_succeeded = True
        self._end(task)
        if task.kind == "probe":
            self._record(task, worker=worker, isolated=True, died_of=None)
            self._suspects.append(task.unit)

    def raised(self, task: UnitTask, error: ColdstillError) -> None:
        """A unit failed, and its worker survived. Raises `error` if the store or the set-up is the cause."""
        self._end(task)
        if isinstance(error, _ENDS_THE_RUN):
            raise error  # every other unit would fail at the same store, function, host or folder
        self._give_up(task.unit, str(error))
        self._count_error(task.unit, error)

    def died(self, tasks: Sequence[UnitTask], *, worker: WorkerHandle, crash: CrashReport) -> None:
        """A worker died while it had these tasks. Raises `UnitFailed` if the first units all kill their workers."""
        is_isolated = len(tasks) == 1
        for task in tasks:
            self._end(task)
            self._record(task, worker=worker, isolated=is_isolated, died_of=crash)
            self._suspects.append(task.unit)
        if is_isolated:
            unit = tasks[0].unit
            error = UnitFailed(
                f"unit {unit}",
                found=f"each of the first units killed its worker: {crash.reason}",
                wanted="an engine that survives one of them",
                fix="see Ray's worker logs; re-run the same command to resume: all committed units are kept",
            )
            self._count_error(unit, error)

    def _next_suspect(self, workers: int) -> int | None:
        """The suspect to run now, if any. One that has not yet killed a worker in isolation may soon pass, so it comes
        first. The others wait until a second worker can run the healthy units, or no healthy unit is left."""
        if self._isolated and self._waiting:
            return None
        fresh = next((unit for unit in self._suspects if unit not in self._errors), None)
        if fresh is None and self._suspects and (workers > 1 or not self._waiting):
            return self._suspects[0]
        return fresh

    def _planned(self, unit: int) -> UnitTask:
        slice_ = self._plan[unit]
        return UnitTask(unit=unit, kind="whole", start=slice_.first_row, stop=slice_.first_row + slice_.rows)

    def _isolated_task(self, unit: int) -> UnitTask | None:
        attempts, slice_ = self._attempts.read(unit), self._plan[unit]
        task = next_task(attempts, first_row=slice_.first_row, rows=slice_.rows, max_attempts=self._max_attempts)
        if task is None:
            deaths = [trial.died_of for trial in attempts.trials if trial.died_of]
            self._give_up(
                unit,
                f"{len(deaths)} workers died while they ran it, also without its poison rows; the last one: "
                f"{deaths[-1].reason}; "
                f"to try it again, delete {attempts_name(unit)}",
            )
            return None
        self._running.add(unit)
        self._isolated.add(unit)
        return task

    def _record(self, task: UnitTask, *, worker: WorkerHandle, isolated: bool, died_of: CrashReport | None) -> None:
        trial = Trial(
            kind=task.kind, start=task.start, stop=task.stop, worker=worker.name, isolated=isolated, died_of=died_of
        )
        trials = (*self._attempts.read(task.unit).trials, trial)
        slice_ = self._plan[task.unit]
        stop = slice_.first_row + slice_.rows
        found = search(trials, start=slice_.first_row, stop=stop, max_attempts=self._max_attempts)
        self._attempts.write(Attempts(unit=task.unit, trials=trials, excluded=found.poison))

    def _end(self, task: UnitTask) -> None:
        self._running.discard(task.unit)
        self._isolated.discard(task.unit)

    def _has_isolated_task(self, worker: WorkerHandle) -> bool:
        return any(task.unit in self._isolated for task in worker.tasks.values())

    def _give_up(self, unit: int, reason: str) -> None:
        self.failed.append(FailedUnit(unit, reason))

    def _count_error(self, unit: int, error: ColdstillError) -> None:
        self._errors[unit] = error
        if not self._has_succeeded and len(self._errors) >= _FIRST_UNITS:
            raise error


def _load(worker: WorkerHandle) -> int:
    return len(worker.tasks)


def names_by_unit(workers: Iterable[WorkerHandle]) -> dict[int, str]:
    """The name of the worker that runs each unit."""
    return {task.unit: worker.name for worker in list(workers) for task in list(worker.tasks.values())}
