"""`CaptureWorker` as a Ray actor: an engine that is loaded once, watched, and asked by up to two threads.

The engine is loaded in the constructor, which Ray runs in the process's main thread: some libraries want that. What it
raises waits for the first call, so that it reaches the driver under its own name.
"""

from __future__ import annotations

from typing import Any

import ray

from coldstill.pipeline.calibration import rank_ids
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.estimate.speed import measure_speed
from coldstill.pipeline.sequences import TokenSequence
from coldstill.pipeline.units.attempts import LastWords, write_last_words
from coldstill.pipeline.units.bisection import UnitTask
from coldstill.pipeline.units.patience import PatientStore
from coldstill.pipeline.units.worker import CaptureWorker, TeacherLoader, load_for
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.plan import Unit

from .dispatcher import TASKS_PER_WORKER
from .metrics import WorkerMetrics
from .watchdog import Watchdog, WatchedTeacher, end_process


@ray.remote
class _RayWorker:
    def __init__(self, config: dict[str, Any], *, name: str, key: str, load: TeacherLoader, header: bytes | None):
        """`key`: under which its last words are found; `header`: for the pilot, when there is no `dataset.json`."""
        self._config = CaptureConfig.model_validate(config)
        self._key = key
        self._metrics = WorkerMetrics(name)
        self._teacher: WatchedTeacher | None = None
        self._error: Exception | None = None
        try:
            facts = header or self._store().read(HEADER_NAME)
            teacher = load_for(self._config, DatasetHeader.from_bytes(facts, where=HEADER_NAME), load)
            self._teacher = WatchedTeacher(teacher, end=self._end)
            Watchdog(self._teacher, hung_after_s=self._config.cluster.hung_after_s, end=self._end).start()
        except Exception as error:
            self._error = error

    def rank_ids(self, header: bytes, unit: tuple[int, ...]) -> list[int]:
        """See `pilot.rank_ids`."""
        facts = DatasetHeader.from_bytes(header, where="the pilot's header")
        return list(rank_ids(self._config, self._loaded(), facts, Unit(*unit)))

    def measure(self, header: bytes, sequences: list[TokenSequence], seconds: float) -> tuple[float, ...]:
        """See `speed.measure_speed`."""
        facts = DatasetHeader.from_bytes(header, where="the probe's header")
        return tuple(measure_speed(self._config, self._loaded(), facts, sequences, seconds=seconds))

    def ready(self) -> None:
        """Return when units can come."""
        self._worker = CaptureWorker(self._config, self._loaded())

    def run(self, task: UnitTask) -> tuple[int, ...] | None:
        """The report of a unit that is committed now; None for a probe that was lived through."""
        if task.kind == "probe":
            self._worker.probe(task.unit, task.start, task.stop)
            return None
        report = self._worker.run(task.unit, task)
        self._metrics.count(report)
        return tuple(report)

    def _loaded(self) -> WatchedTeacher:
        if self._error:
            raise self._error
        assert self._teacher is not None
        return self._teacher

    def _store(self) -> PatientStore:
        return PatientStore(self._config.output, patience_s=self._config.cluster.store_retry_s)

    def _end(self, words: LastWords) -> None:
        end_process(words, teacher=self._teacher, speak=lambda words: write_last_words(self._store(), self._key, words))


def new_actor(
    config: CaptureConfig, *, name: str, key: str, gpus: float, load: TeacherLoader, header: bytes | None = None
) -> Any:
    """Ask Ray for an actor; it is there when its `ready` or `rank_ids` returns."""
    options: dict[str, Any] = {
        "name": name,
        "num_cpus": config.cluster.cpus_per_worker,
        "num_gpus": gpus,
        "max_concurrency": TASKS_PER_WORKER,
        # Whether a unit is tried again is for the dispatcher to say: Ray would send the same call to a new actor.
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    settings = config.model_dump()
    return _RayWorker.options(**options).remote(settings, name=name, key=key, load=load, header=header)  # type: ignore[attr-defined]
