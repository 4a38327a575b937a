"""The workers of one capture. Numbers of units in, their reports out, in the order in which they end.

Ray owns placement, process life and elasticity; the commit records own the truth.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import UnitFailed
from coldstill.pipeline.estimate.speed import SpeedReport
from coldstill.pipeline.sequences import TokenSequence
from coldstill.pipeline.teachers.protocol import load_teacher
from coldstill.pipeline.units.attempts import (
    LastWords,
    read_attempts,
    read_last_words,
    units_with_attempts,
    write_attempts,
)
from coldstill.pipeline.units.patience import PatientStore
from coldstill.pipeline.units.worker import TeacherLoader, UnitReport
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_from_bytes

from .dispatcher import AttemptBook, Dispatcher, FailedUnit, Worker, names_by_unit
from .metrics import DriverMetrics
from .pool import Died, Done, Pool, Raised, Started, StartRaised
from .resources import gpus_per_worker, require_room

_STARTS = 3
"""So many starts that end in a death, one after the other, tell against the set-up."""
_LONGEST_REASON = 400


class Workforce:
    """The actors of one capture. Joins the cluster that the settings or RAY_ADDRESS name, or starts one on this
    machine, when the first is needed; leaves it at the end."""

    def __init__(self, config: CaptureConfig, *, load: TeacherLoader = load_teacher):
        """`load`: what gives a worker its teacher; it travels to the workers."""
        self.failed: list[FailedUnit] = []
        """Units that could not be done, so far."""
        self.gpus_per_worker = 0.0
        """GPUs that each worker holds; known once the cluster is joined."""
        self._config, self._load = config, load
        self._store = PatientStore(config.output, patience_s=config.cluster.store_retry_s)
        self._is_joined = False
        self._pool: Pool | None = None

    def __enter__(self) -> Workforce:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool = None
        if self._is_joined:
            ray.shutdown()

    @property
    def workers(self) -> int:
        """Workers that are ready now."""
        pool = self._pool  # other threads look too
        return len(pool.ready) if pool else 0

    @property
    def running(self) -> dict[int, str]:
        """Units under way, and the names of their workers."""
        pool = self._pool
        return names_by_unit(pool.workers) if pool else {}

    def rank_ids(self, header: DatasetHeader, unit: Unit) -> list[int]:
        """The id rank table that the pilot gives (`pilot.py`). Its actor and engine stay for the units.

        Raises as `run_units`.
        """

        def ask(actor: Any) -> Any:
            return actor.rank_ids.remote(header.to_bytes(), astuple(unit))

        ranks: list[int] = self._ask_one(ask, header, what="the pilot", fix="calibration_targets: 0 does without it")
        return ranks

    def measure(self, header: DatasetHeader, sequences: list[TokenSequence], *, seconds: float) -> SpeedReport:
        """What one worker does with these in so many seconds (`speed.py`). Raises as `run_units`."""

        def ask(actor: Any) -> Any:
            return actor.measure.remote(header.to_bytes(), sequences, seconds)

        return SpeedReport(*self._ask_one(ask, header, what="the probe", fix="--dry-run does without it"))

    def _ask_one(self, ask: Callable[[Any], Any], header: DatasetHeader, *, what: str, fix: str) -> Any:
        """What one worker answers, which is replaced where it dies; it stays."""
        pool = self._joined()
        for _ in range(_STARTS):
            worker = pool.add(header.to_bytes())
            try:
                return ray.get(ask(worker.actor))
            except RayTaskError as error:
                raise _named(what, error) from None
            except RayError as error:
                words = self._words_of(worker, error)
                pool.remove(worker)
        raise _given_up(what, words, fix=f"see Ray's worker logs; {fix}")

    def run_units(self, todo: list[int]) -> Iterator[UnitReport]:
        """Do the units on up to `cluster.max_workers` actors. What cannot be done is in `failed` afterwards.

        Raises what tells against the set-up: a worker's own named error or repeated death at its start, or that of the
        first three units; and what concerns all units alike, `StorageFailed`.
        """
        pool, metrics = self._joined(), DriverMetrics()
        for worker in pool.workers:
            pool.prepare(worker)
        dispatcher = self._dispatcher(todo)
        self.failed = dispatcher.failed
        deaths_at_start, is_open = 0, False
        while dispatcher.unfinished:
            wanted = min(self._config.cluster.max_workers, dispatcher.unfinished)
            for _ in range(len(pool.workers), wanted):
                pool.prepare(pool.add())
            pool.release_to(wanted)
            metrics.show(ready=len(pool.ready), starting=len(pool.workers) - len(pool.ready))
            is_open = is_open or len(pool.ready) >= min(self._config.cluster.min_workers, wanted)
            for worker, task in dispatcher.assign(pool.ready) if is_open else ():
                pool.give(worker, task)
            for event in pool.ended():
                match event:
                    case Started():
                        deaths_at_start = 0
                    case Done(worker, task, report):
                        dispatcher.done(task, worker=worker)
                        if report:
                            yield report
                    case StartRaised(_, raised):
                        raise _named("a worker's start", raised)
                    case Raised(_, task, raised):
                        dispatcher.raised(task, _named(f"unit {task.unit}", raised))
                    case Died(worker, lost, death):
                        words = self._words_of(worker, death)
                        dispatcher.died(lost, worker=worker, words=words)
                        deaths_at_start += not worker.is_ready
                        if deaths_at_start >= _STARTS:
                            raise _given_up("a worker's start", words, fix="see Ray's worker logs")

    def _dispatcher(self, todo: list[int]) -> Dispatcher:
        return Dispatcher(
            todo,
            known_suspects=units_with_attempts(self._store),
            plan=plan_from_bytes(self._store.read(PLAN_NAME), where=PLAN_NAME),
            book=AttemptBook(
                lambda unit: read_attempts(self._store, unit), lambda attempts: write_attempts(self._store, attempts)
            ),
            attempts=self._config.max_attempts,
        )

    def _joined(self) -> Pool:
        if self._pool:
            return self._pool
        is_local = self._config.cluster.address is None and "RAY_ADDRESS" not in os.environ
        ray.init(
            # Said outright: without an address Ray would join whatever cluster was last started on this machine.
            address="local" if is_local else self._config.cluster.address,
            include_dashboard=False if is_local else None,
            # What Ray warns of in a cluster of this capture alone (its token, its dashboard) concerns nobody.
            logging_level=logging.ERROR if is_local else logging.WARNING,
            log_to_driver=False,
        )
        self._is_joined = True
        resources = ray.cluster_resources()
        self.gpus_per_worker = gpus_per_worker(self._config, resources)
        if is_local:
            require_room(self._config, resources, gpus=self.gpus_per_worker)
        self._pool = Pool(self._config, gpus=self.gpus_per_worker, load=self._load)
        return self._pool

    def _words_of(self, worker: Worker, error: RayError) -> LastWords:
        """Why a worker is gone: what it said, else what Ray says."""
        said = read_last_words(self._store, worker.key)
        if said:
            return said
        text = str(error).partition("The actor is dead because ")[2] or str(error)
        return LastWords(cause="its worker died", reason=" ".join(text.split())[:_LONGEST_REASON])


def _named(what: str, error: RayTaskError) -> ColdstillError:
    """The worker's own error where it has a name; otherwise `UnitFailed` with its traceback."""
    cause = error.cause
    if isinstance(cause, ColdstillError):
        return cause
    return UnitFailed(what, found=str(error), wanted="no exception", fix="what was committed stays good")


def _given_up(what: str, words: LastWords, *, fix: str) -> UnitFailed:
    return UnitFailed(
        what,
        found=f"its worker died {_STARTS} times: {words.reason}",
        wanted="a worker that lives through it",
        fix=f"{fix}; what was committed stays good, start again to go on",
    )
