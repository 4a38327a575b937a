"""Which worker gets which task, and what its outcome means. Knows attempts and workers' loads; not Ray.

Healthy units fill all workers. The units of a worker that died are suspects: each is tried alone, on one worker at a
time while there are healthy units, so that no healthy one is blamed for its neighbour and none has to wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.errors import UnitFailed
from coldstill.pipeline.units.attempts import Attempts, LastWords, Trial, attempts_name
from coldstill.pipeline.units.bisection import UnitTask, next_task, search
from coldstill.storage_schema.errors import StorageFailed
from coldstill.storage_schema.plan import Unit

TASKS_PER_WORKER = 2
"""One at the teacher, one that is read before it or committed after it."""
_FIRST_UNITS = 3
"""So many units that all fail, before any succeeds, tell against the set-up."""


class FailedUnit(NamedTuple):
    """A unit that could not be done, and why."""

    unit: int
    reason: str


@dataclass(eq=False)
class Worker:
    """A worker as the driver sees it. `tasks`: what it has been given, by the reference that Ray answers with."""

    name: str
    actor: Any
    key: str
    is_ready: bool = False
    tasks: dict[Any, UnitTask] = field(default_factory=dict)


class AttemptBook(NamedTuple):
    """Where attempts are kept: `read` and `write` the trials of a unit."""

    read: Callable[[int], Attempts]
    write: Callable[[Attempts], None]


class Dispatcher:
    """The units of one run: those that wait, those under suspicion, those that failed."""

    def __init__(
        self,
        todo: Sequence[int],
        *,
        known_suspects: AbstractSet[int],
        plan: Sequence[Unit],
        book: AttemptBook,
        attempts: int,
    ):
        """`known_suspects`: units over which a worker died in an earlier run; `attempts`: deaths that prove guilt."""
        self._waiting = deque(unit for unit in todo if unit not in known_suspects)
        self._suspects = deque(unit for unit in todo if unit in known_suspects)
        self._plan, self._book, self._max_attempts = plan, book, attempts
        self._under_way: set[int] = set()
        self._lone: set[int] = set()
        self._has_succeeded = False
        self._troubled: dict[int, ColdstillError] = {}
        self.failed: list[FailedUnit] = []

    @property
    def unfinished(self) -> int:
        """Units that are neither committed nor given up."""
        return len(self._waiting) + len(self._suspects) + len(self._under_way)

    def assign(self, workers: Sequence[Worker]) -> Iterator[tuple[Worker, UnitTask]]:
        """Tasks for workers that are ready; the caller gives out each before it asks for the next."""
        reserved = None
        while (suspect := self._next_suspect(len(workers))) is not None:
            reserved = min(workers, key=_load, default=None)
            if reserved is None or reserved.tasks:
                break  # it gets nothing else until it is idle
            self._suspects.remove(suspect)
            if (task := self._lone_task(suspect)) is not None:
                yield reserved, task
            reserved = None
        open_to_all = [worker for worker in workers if worker is not reserved and not self._is_alone(worker)]
        while self._waiting:
            worker = min(open_to_all, key=_load, default=None)
            if worker is None or _load(worker) >= TASKS_PER_WORKER:
                return
            unit = self._waiting.popleft()
            self._under_way.add(unit)
            yield worker, self._planned(unit)

    def done(self, task: UnitTask, *, worker: Worker) -> None:
        """A unit is committed, or a worker has lived through a probe."""
        self._has_succeeded = True
        self._end(task)
        if task.kind == "probe":
            self._record(task, worker=worker, alone=True, died_of=None)
            self._suspects.append(task.unit)

    def raised(self, task: UnitTask, error: ColdstillError) -> None:
        """A unit failed, and its worker lives. Raises what tells against store or set-up."""
        self._end(task)
        if isinstance(error, StorageFailed):
            raise error  # every other unit would wait for the same store
        self._give_up(task.unit, str(error))
        self._trouble(task.unit, error)

    def died(self, tasks: Sequence[UnitTask], *, worker: Worker, words: LastWords) -> None:
        """A worker died and had these tasks. Raises what tells against the set-up."""
        for task in tasks:
            self._end(task)
            self._record(task, worker=worker, alone=len(tasks) == 1, died_of=words)
            self._suspects.append(task.unit)
        if len(tasks) == 1:
            unit = tasks[0].unit
            error = UnitFailed(
                f"unit {unit}",
                found=f"the first units all end their workers: {words.reason}",
                wanted="an engine that lives through one of them",
                fix="see Ray's worker logs; what was committed stays good, start again to go on",
            )
            self._trouble(unit, error)

    def _next_suspect(self, workers: int) -> int | None:
        """The suspect that is next, if it is time for one. One that has not yet died alone may soon be acquitted; the
        others wait until a second worker goes on with the healthy units, or none of these is left."""
        if self._lone and self._waiting:
            return None
        fresh = next((unit for unit in self._suspects if unit not in self._troubled), None)
        if fresh is None and self._suspects and (workers > 1 or not self._waiting):
            return self._suspects[0]
        return fresh

    def _planned(self, unit: int) -> UnitTask:
        slice_ = self._plan[unit]
        return UnitTask(unit=unit, kind="whole", start=slice_.first_row, stop=slice_.first_row + slice_.rows)

    def _lone_task(self, unit: int) -> UnitTask | None:
        attempts, slice_ = self._book.read(unit), self._plan[unit]
        task = next_task(attempts, first_row=slice_.first_row, rows=slice_.rows, max_attempts=self._max_attempts)
        if task is None:
            deaths = [trial.died_of for trial in attempts.trials if trial.died_of]
            self._give_up(
                unit,
                f"{len(deaths)} workers died over it, also without its deadly rows; the last of: {deaths[-1].reason}; "
                f"remove {attempts_name(unit)} to try it anew",
            )
            return None
        self._under_way.add(unit)
        self._lone.add(unit)
        return task

    def _record(self, task: UnitTask, *, worker: Worker, alone: bool, died_of: LastWords | None) -> None:
        trial = Trial(
            kind=task.kind, start=task.start, stop=task.stop, worker=worker.name, alone=alone, died_of=died_of
        )
        trials = (*self._book.read(task.unit).trials, trial)
        slice_ = self._plan[task.unit]
        stop = slice_.first_row + slice_.rows
        found = search(trials, start=slice_.first_row, stop=stop, max_attempts=self._max_attempts)
        self._book.write(Attempts(unit=task.unit, trials=trials, excluded=found.guilty))

    def _end(self, task: UnitTask) -> None:
        self._under_way.discard(task.unit)
        self._lone.discard(task.unit)

    def _is_alone(self, worker: Worker) -> bool:
        return any(task.unit in self._lone for task in worker.tasks.values())

    def _give_up(self, unit: int, reason: str) -> None:
        self.failed.append(FailedUnit(unit, reason))

    def _trouble(self, unit: int, error: ColdstillError) -> None:
        self._troubled[unit] = error
        if not self._has_succeeded and len(self._troubled) >= _FIRST_UNITS:
            raise error


def _load(worker: Worker) -> int:
    return len(worker.tasks)


def names_by_unit(workers: Iterable[Worker]) -> dict[int, str]:
    """Which worker has which unit."""
    return {task.unit: worker.name for worker in list(workers) for task in list(worker.tasks.values())}
