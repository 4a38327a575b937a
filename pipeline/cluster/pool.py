"""The workers of one capture: starts, replaces and releases Ray actors, and runs units on them.

Ray places, starts and ends the processes, and grows the cluster. The commit records show which units are done. All
actors are requested at once: those that do not fit yet stay pending, and make an autoscaler add nodes.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.calibration import Calibration
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import UnitFailed
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.worker import SpeedReport, TeacherLoader, UnitReport, UnitTask
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_from_bytes
from coldstill.storage_schema.store.retrying import RetryingStore

from .actor import new_actor
from .attempts import AttemptStore, CrashReport, read_crash_report
from .dispatcher import TASKS_PER_WORKER, Dispatcher, FailedUnit, WorkerHandle, names_by_unit
from .ray_cluster import DriverMetrics, PlacementReport, join_cluster, plain_reason, without_codes

_MAX_START_DEATHS = 3
"""If this many consecutive starts end in a death, the set-up is wrong."""
_WAIT_S = 1.0


class _Started(NamedTuple):
    """A worker became ready."""

    worker: WorkerHandle


class _StartRaised(NamedTuple):
    """The start of a worker raised."""

    error: RayTaskError


class _Done(NamedTuple):
    """A task ended without error. `report`: of its commit; None for a probe."""

    worker: WorkerHandle
    task: UnitTask
    report: UnitReport | None


class _Raised(NamedTuple):
    """A task raised, and its worker survived."""

    task: UnitTask
    error: RayTaskError


class _Died(NamedTuple):
    """A worker died with the tasks that it had; it is already removed."""

    worker: WorkerHandle
    lost: tuple[UnitTask, ...]
    error: RayError


_Event = _Started | _StartRaised | _Done | _Raised | _Died


class WorkerPool:
    """The Ray actors of one capture.

    Joins the cluster that the settings or RAY_ADDRESS name, or starts one on this machine, when the first worker is
    needed. Leaves it at the end of the `with` block, which ends the actors; a second block joins it again.
    """

    def __init__(self, config: CaptureConfig, *, load: TeacherLoader | None = None):
        """`load`: called by each worker to load its teacher; Ray sends it there. None: `worker.load_teacher`."""
        self.failed: list[FailedUnit] = []
        """Units that were given up so far."""
        self.gpus_per_worker = 0.0
        """GPUs that each worker holds; known once the cluster is joined."""
        self._config, self._load = config, load
        self._store = RetryingStore(config.output, retry_for_s=config.cluster.store_retry_s)
        self._folder = os.getcwd()
        self._token = secrets.token_hex(4)
        self._is_joined = False
        self._requested = 0
        self._workers: list[WorkerHandle] = []
        self._calls: dict[Any, WorkerHandle] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *raised: object) -> None:
        self._workers, self._calls = [], {}
        if self._is_joined:
            self._is_joined = False
            ray.shutdown()

    @property
    def workers(self) -> int:
        """Workers that are ready now."""
        return len(self._ready)

    @property
    def running(self) -> dict[int, str]:
        """Units in progress, and the names of their workers."""
        return names_by_unit(self._workers)

    def calibrate(self, header: DatasetHeader, unit: Unit) -> Calibration:
        """The result of the calibration pass (`calibration.py`). The worker and its engine are kept.

        Raises what `run_units` raises.
        """

        def call(actor: Any) -> Any:
            return actor.calibrate.remote(header.to_bytes(), astuple(unit))

        ranks, tail_mass = self._call_one(
            call, header, what="the calibration pass", fix="set calibration_targets: 0 to skip it"
        )
        return Calibration(tuple(ranks), tail_mass)

    def measure(self, header: DatasetHeader, sequences: list[TokenSequence], *, seconds: float) -> SpeedReport:
        """The speed of one worker on these sequences: `worker.measure_speed` for `seconds`.

        Raises what `run_units` raises.
        """

        def call(actor: Any) -> Any:
            return actor.measure.remote(header.to_bytes(), sequences, seconds)

        return SpeedReport(*self._call_one(call, header, what="the probe", fix="use --dry-run without --probe"))

    def run_units(self, todo: list[int]) -> Iterator[UnitReport]:
        """Run units on up to `cluster.max_workers` actors. Yields reports in the order in which units end.

        Units that were given up are in `failed` afterwards. Raises a worker's named error at its start; `UnitFailed` if
        workers die at each start or in each of the first units; the error of the first units if all of them raise; and
        `StorageFailed`, which affects all units.
        """
        self._join()
        metrics, dispatcher = DriverMetrics(), self._dispatcher(todo)
        self.failed = dispatcher.failed
        for worker in self._workers:
            self._prepare(worker)
        start_deaths, is_open = 0, False
        placement = PlacementReport(self._config)
        while dispatcher.unfinished:
            wanted = min(self._config.cluster.max_workers, dispatcher.unfinished)
            for _ in range(len(self._workers), wanted):
                self._prepare(self._add())
            self._release_to(wanted)
            ready = self._ready
            metrics.show(ready=len(ready), starting=len(self._workers) - len(ready))
            least = 1 if is_open else min(self._config.cluster.min_workers, wanted)
            placement.update(ready=len(ready), wanted=least)
            is_open = is_open or len(ready) >= least
            for worker, task in dispatcher.assign(ready) if is_open else ():
                self._give(worker, task)
            for event in self._events():
                match event:
                    case _Started():
                        start_deaths = 0
                    case _Done(worker, task, report):
                        dispatcher.done(task, worker=worker)
                        if report:
                            yield report
                    case _StartRaised(error):
                        raise _named("a worker's start", error)
                    case _Raised(task, error):
                        dispatcher.raised(task, _named(f"unit {task.unit}", error))
                    case _Died(worker, lost, death):
                        crash = self._crash_report(worker, death)
                        dispatcher.died(lost, worker=worker, crash=crash)
                        start_deaths += not worker.is_ready
                        if start_deaths >= _MAX_START_DEATHS:
                            raise _died_at_each_start("a worker's start", crash, fix="see Ray's worker logs")

    def _call_one(self, call: Callable[[Any], Any], header: DatasetHeader, *, what: str, fix: str) -> Any:
        """The result of one call on one worker. A worker that dies is replaced; the last one stays."""
        self._join()
        for _ in range(_MAX_START_DEATHS):
            worker = self._add(header.to_bytes())
            reference, placement = call(worker.actor), PlacementReport(self._config)
            while not ray.wait([reference], timeout=_WAIT_S)[0]:
                placement.update(ready=0, wanted=1)
            try:
                return ray.get(reference)
            except RayTaskError as error:
                raise _named(what, error) from None
            except RayError as error:
                crash = self._crash_report(worker, error)
                self._remove(worker)
        raise _died_at_each_start(what, crash, fix=f"see Ray's worker logs, or {fix}")

    def _join(self) -> None:
        if not self._is_joined:
            self._config = join_cluster(self._config)
            self.gpus_per_worker = self._config.cluster.gpus_per_worker or 0.0
            self._is_joined = True

    def _dispatcher(self, todo: list[int]) -> Dispatcher:
        return Dispatcher(
            todo,
            plan=plan_from_bytes(self._store.read(PLAN_NAME), where=PLAN_NAME),
            attempts=AttemptStore(self._store),
            max_attempts=self._config.max_attempts,
        )

    @property
    def _ready(self) -> list[WorkerHandle]:
        return [worker for worker in self._workers if worker.is_ready]

    def _add(self, header: bytes | None = None) -> WorkerHandle:
        """Request one more worker. `header`: for one that is called before `dataset.json` is written."""
        name = f"worker-{self._requested}"
        self._requested += 1
        key = f"{self._token}-{name}"
        actor = new_actor(
            self._config,
            name=name,
            crash_key=key,
            folder=self._folder,
            tasks=TASKS_PER_WORKER,
            load=self._load,
            header=header,
        )
        worker = WorkerHandle(name, actor, key)
        self._workers.append(worker)
        return worker

    def _prepare(self, worker: WorkerHandle) -> None:
        """Make a worker open the dataset. `_events` returns `_Started` when it has."""
        self._calls[worker.actor.ready.remote()] = worker

    def _give(self, worker: WorkerHandle, task: UnitTask) -> None:
        reference = worker.actor.run.remote(task)
        self._calls[reference] = worker
        worker.tasks[reference] = task

    def _remove(self, worker: WorkerHandle) -> None:
        """Kill a worker. Ray may report a worker as unavailable that still runs behind a broken connection: its late
        commits do no harm, but it would keep its GPU."""
        ray.kill(worker.actor)
        self._workers.remove(worker)
        self._calls = {call: owner for call, owner in self._calls.items() if owner is not worker}
        worker.tasks.clear()

    def _release_to(self, wanted: int) -> None:
        """Kill workers without a task until `wanted` workers are left; those that are not ready first."""
        spare = sorted((worker for worker in self._workers if not worker.tasks), key=lambda worker: worker.is_ready)
        for worker in spare[: max(0, len(self._workers) - wanted)]:
            self._remove(worker)

    def _events(self) -> list[_Event]:
        """The events since the last call; waits up to a second for the first one. Dead workers are removed."""
        if not self._calls:
            return []  # the last unit was given up
        first, _ = ray.wait(list(self._calls), num_returns=1, timeout=_WAIT_S)
        rest, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        events: list[_Event] = []
        deaths: dict[WorkerHandle, RayError] = {}
        for reference in {*first, *rest}:
            worker = self._calls.pop(reference)
            try:
                report = ray.get(reference)
            except RayTaskError as error:
                task = worker.tasks.pop(reference, None)
                events.append(_Raised(task, error) if task else _StartRaised(error))
            except RayError as error:
                deaths[worker] = error  # tasks that it ended before are among the other calls
            else:
                if task := worker.tasks.pop(reference, None):
                    events.append(_Done(worker, task, UnitReport(*report) if report else None))
                else:
                    worker.is_ready = True
                    events.append(_Started(worker))
        for worker, death in deaths.items():
            events.append(_Died(worker, tuple(worker.tasks.values()), death))
            self._remove(worker)
        return events

    def _crash_report(self, worker: WorkerHandle, error: RayError) -> CrashReport:
        """The worker's own crash report, or else the reason that Ray reports."""
        if found := read_crash_report(self._store, worker.crash_key):
            return found
        text = str(error).partition("The actor is dead because ")[2] or str(error)
        return CrashReport(cause="its worker died", reason=plain_reason(text))


def _named(what: str, error: RayTaskError) -> ColdstillError:
    """The worker's own `ColdstillError`; for other exceptions `UnitFailed` with the traceback."""
    cause = error.cause
    if isinstance(cause, ColdstillError):
        return cause
    return UnitFailed(
        what,
        found=without_codes(str(error)),
        wanted="no exception",
        fix="see the traceback above; all committed units are kept",
    )


def _died_at_each_start(what: str, crash: CrashReport, *, fix: str) -> UnitFailed:
    return UnitFailed(
        what,
        found=f"its worker died {_MAX_START_DEATHS} times: {crash.reason}",
        wanted="a worker that survives it",
        fix=f"{fix}; re-run the same command to resume: all committed units are kept",
    )
