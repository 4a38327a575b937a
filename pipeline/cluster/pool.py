"""The actors of a capture: asked for, replaced when they die, released when there is nothing left for them.

All are asked for at once: those that do not fit yet are pending and pull nodes in.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.units.bisection import UnitTask
from coldstill.pipeline.units.worker import TeacherLoader, UnitReport

from .actor import new_actor
from .dispatcher import Worker

_LONGEST_WAIT_S = 1.0


class Started(NamedTuple):
    """A worker that tasks can be given to."""

    worker: Worker


class Done(NamedTuple):
    """A task that ended well, with the report of its commit; a probe has none."""

    worker: Worker
    task: UnitTask
    report: UnitReport | None


class StartRaised(NamedTuple):
    """A worker whose start raised."""

    worker: Worker
    error: RayTaskError


class Raised(NamedTuple):
    """A task that raised; its worker lives."""

    worker: Worker
    task: UnitTask
    error: RayTaskError


class Died(NamedTuple):
    """A worker that is no more, and the tasks that it had."""

    worker: Worker
    lost: tuple[UnitTask, ...]
    error: RayError


Event = Started | StartRaised | Done | Raised | Died


class Pool:
    """Workers, and what each is doing."""

    def __init__(self, config: CaptureConfig, *, gpus: float, load: TeacherLoader):
        self._config, self._gpus, self._load = config, gpus, load
        self._token = secrets.token_hex(4)
        self._asked_for = 0
        self._calls: dict[Any, Worker] = {}
        self.workers: list[Worker] = []

    @property
    def ready(self) -> list[Worker]:
        """Workers that units can be given to."""
        return [worker for worker in self.workers if worker.is_ready]

    def add(self, header: bytes | None = None) -> Worker:
        """Ask for one more worker; `header` for one that is to run the pilot first."""
        name = f"worker-{self._asked_for}"
        self._asked_for += 1
        key = f"{self._token}-{name}"
        actor = new_actor(self._config, name=name, key=key, gpus=self._gpus, load=self._load, header=header)
        worker = Worker(name, actor, key)
        self.workers.append(worker)
        return worker

    def prepare(self, worker: Worker) -> None:
        """Have a worker open the dataset; `ended` tells when it has."""
        self._calls[worker.actor.ready.remote()] = worker

    def give(self, worker: Worker, task: UnitTask) -> None:
        """Send a task to a worker."""
        reference = worker.actor.run.remote(task)
        self._calls[reference] = worker
        worker.tasks[reference] = task

    def remove(self, worker: Worker) -> None:
        """End a worker for good. One that is "unavailable" may be alive behind a broken connection: its late commits
        are harmless, its GPU is not."""
        ray.kill(worker.actor)
        self.workers.remove(worker)
        self._calls = {call: owner for call, owner in self._calls.items() if owner is not worker}
        worker.tasks.clear()

    def release_to(self, wanted: int) -> None:
        """End workers that have no task until `wanted` are left, first those that have not even started."""
        spare = sorted((worker for worker in self.workers if not worker.tasks), key=lambda worker: worker.is_ready)
        for worker in spare[: max(0, len(self.workers) - wanted)]:
            self.remove(worker)

    def ended(self) -> list[Event]:
        """What ended since the last call, waiting a second for the first. A dead worker is removed."""
        if not self._calls:
            return []  # the last unit was given up
        first, _ = ray.wait(list(self._calls), num_returns=1, timeout=_LONGEST_WAIT_S)
        rest, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        ended: list[Event] = []
        deaths: dict[Worker, RayError] = {}
        for reference in {*first, *rest}:
            worker = self._calls.pop(reference)
            try:
                report = ray.get(reference)
            except RayTaskError as error:
                task = worker.tasks.pop(reference, None)
                ended.append(Raised(worker, task, error) if task else StartRaised(worker, error))
            except RayError as error:
                deaths[worker] = error  # what else it did before is among the other calls
            else:
                if task := worker.tasks.pop(reference, None):
                    ended.append(Done(worker, task, UnitReport(*report) if report else None))
                else:
                    worker.is_ready = True
                    ended.append(Started(worker))
        for worker, death in deaths.items():
            ended.append(Died(worker, tuple(worker.tasks.values()), death))
            self.remove(worker)
        return ended
