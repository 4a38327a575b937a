"""`CaptureWorker` as a Ray actor: one engine, loaded once, watched, and called from two threads.

On a worker, Ray imports this file before the actor's constructor runs `search_last`. So it imports only the standard
library and Ray at its top, and everything else inside the methods.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from coldstill.pipeline.config import CaptureConfig
    from coldstill.pipeline.teachers.protocol import TokenSequence
    from coldstill.pipeline.worker import TeacherLoader, UnitTask
    from coldstill.storage_schema.store.retrying import RetryingStore

    from .attempts import CrashReport
    from .watchdog import WatchedTeacher


@ray.remote
class _RayWorker:
    """The engine is loaded in the constructor, which Ray runs in the main thread: some libraries require that. An error
    of the constructor is raised by the first call, so that it reaches the driver under its own name."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        name: str,
        crash_key: str,
        folder: str,
        load: TeacherLoader | None,
        header: bytes | None,
    ):
        """`folder`: the driver's current folder; `header`: used while there is no `dataset.json` yet."""
        search_last(folder)
        from .ray_cluster import WorkerMetrics

        self._crash_key = crash_key
        self._metrics = WorkerMetrics(name)
        self._teacher: WatchedTeacher | None = None
        self._error: Exception | None = None
        try:
            self._start(config, load=load, header=header)
        except Exception as error:
            self._error = error

    def _start(self, config: dict[str, Any], *, load: TeacherLoader | None, header: bytes | None) -> None:
        from coldstill.pipeline.config import CaptureConfig
        from coldstill.pipeline.worker import load_for, load_teacher
        from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader

        from .watchdog import Watchdog, WatchedTeacher

        self._config = CaptureConfig.model_validate(config)
        facts = header or self._store().read(HEADER_NAME)
        teacher = load_for(self._config, DatasetHeader.from_bytes(facts, where=HEADER_NAME), load or load_teacher)
        self._teacher = WatchedTeacher(teacher, on_exit=self._exit)
        Watchdog(self._teacher, hung_after_s=self._config.cluster.hung_after_s, on_exit=self._exit).start()

    def calibrate(self, header: bytes, unit: tuple[int, ...]) -> tuple[list[int], float]:
        """See `calibration.calibrate`."""
        from coldstill.pipeline.calibration import calibrate
        from coldstill.storage_schema.header import DatasetHeader
        from coldstill.storage_schema.plan import Unit

        teacher = self._loaded()
        facts = DatasetHeader.from_bytes(header, where="the header of the calibration pass")
        found = calibrate(self._config, teacher, facts, Unit(*unit))
        return list(found.id_ranks), found.tail_mass

    def measure(self, header: bytes, sequences: list[TokenSequence], seconds: float) -> tuple[float, ...]:
        """See `worker.measure_speed`."""
        from coldstill.pipeline.worker import measure_speed
        from coldstill.storage_schema.header import DatasetHeader

        facts = DatasetHeader.from_bytes(header, where="the header of the speed probe")
        return tuple(measure_speed(self._loaded(), facts, sequences, seconds=seconds))

    def ready(self) -> None:
        """Open the dataset. Returns when the worker can take units."""
        from coldstill.pipeline.worker import CaptureWorker

        teacher = self._loaded()
        self._worker = CaptureWorker(self._config, teacher)

    def run(self, task: UnitTask) -> tuple[Any, ...] | None:
        """The report of a unit that is now committed; None for a probe."""
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

    def _store(self) -> RetryingStore:
        from coldstill.storage_schema.store.retrying import RetryingStore

        return RetryingStore(self._config.output, retry_for_s=self._config.cluster.store_retry_s)

    def _exit(self, crash: CrashReport) -> None:
        from .attempts import write_crash_report
        from .watchdog import end_process

        end_process(
            crash,
            teacher=self._teacher,
            on_exit=lambda crash: write_crash_report(self._store(), self._crash_key, crash),
        )


def new_actor(
    config: CaptureConfig,
    *,
    name: str,
    crash_key: str,
    folder: str,
    tasks: int,
    load: TeacherLoader | None,
    header: bytes | None = None,
) -> Any:
    """Request an actor for up to `tasks` tasks at a time from Ray. It runs once one of its methods has returned."""
    options: dict[str, Any] = {
        "name": name,
        "num_cpus": config.cluster.cpus_per_worker,
        "num_gpus": config.cluster.gpus_per_worker,
        "max_concurrency": tasks,
        # The dispatcher decides what is retried. Ray itself would send the same call to a new actor.
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    return _RayWorker.options(**options).remote(  # type: ignore[attr-defined]
        config.model_dump(), name=name, crash_key=crash_key, folder=folder, load=load, header=header
    )


def search_last(folder: str) -> None:
    """Make Python search `folder` for modules after all other places.

    Ray puts the driver's current folder first on a worker's `sys.path`, where a file such as `datasets.py` would hide
    an installed package. The user's own modules (`common.plugins`) are still found there. On the other machines of a
    cluster, such a module must be installed or lie in a folder of the same path.
    """
    if sys.path and sys.path[0] == folder:
        del sys.path[0]
    if folder not in sys.path:
        sys.path.append(folder)
