"""Units over Ray actors. Numbers of units in, their reports out, in the order in which they end.

Ray owns placement, process life and elasticity; the commit records own the truth. An actor has at most two units: one
runs, one waits, so that no engine is idle between units. All actors are asked for at once: those that do not fit yet
are pending and pull nodes in. The one file that imports Ray.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayTaskError

from storage_schema.errors import ColdstillError
from storage_schema.header import DatasetHeader
from storage_schema.plan import Unit

from .config import CaptureConfig
from .errors import ClusterTooSmall, UnitFailed
from .pilot import rank_ids
from .teachers.protocol import Teacher, load_teacher
from .worker import CaptureWorker, UnitReport

_UNITS_PER_ACTOR = 2
_DEATHS = 2
"""How often a worker may die over one unit, or at its start, before the capture ends. A worker had up to two units when
it died: both are tried again alone, so that a healthy unit is not blamed for its neighbour a second time."""


class Workforce:
    """The actors of one capture. Joins the cluster that the settings or RAY_ADDRESS name, or starts one on this
    machine, when the first is needed; leaves it at the end."""

    def __init__(self, config: CaptureConfig):
        self._config = config
        self._is_joined = False
        self._ready: Any = None

    def __enter__(self) -> Workforce:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._is_joined:
            ray.shutdown()

    def rank_ids(self, header: DatasetHeader, unit: Unit) -> list[int]:
        """The id rank table that the pilot gives (`pilot.py`). Its actor and engine stay for the units.

        Raises as `run_units`.
        """
        self._join()
        for _ in range(_DEATHS + 1):
            actor = _new_actor(self._config)
            try:
                ranks: list[int] = ray.get(actor.rank_ids.remote(header.to_bytes(), astuple(unit)))
            except RayTaskError as error:
                raise _named("the pilot", error) from None
            except RayActorError as error:
                died = error
            else:
                self._ready = actor
                return ranks
        raise _given_up("the pilot", _DEATHS + 1, died)

    def run_units(self, todo: list[int]) -> Iterator[UnitReport]:
        """Do the units on up to `cluster.max_workers` actors.

        Raises a worker's own named error, or `UnitFailed` for a unit whose worker died twice while it was alone there.
        """
        self._join()
        pool = _Pool(self._config, actors=min(self._config.cluster.max_workers, len(todo)), first=self._ready)
        waiting, suspects = deque(todo), deque[int]()
        deaths: Counter[int | None] = Counter()
        while waiting or suspects or pool.busy:
            pool.fill(waiting, suspects)
            for unit, result in pool.ended():
                if result is None:
                    deaths[None] = 0  # only starts that fail one after the other tell against the set-up
                    continue
                if isinstance(result, UnitReport):
                    yield result
                    continue
                if isinstance(result, RayTaskError):
                    raise _named(_what(unit), result)
                deaths[unit] += 1
                if deaths[unit] > _DEATHS:
                    raise _given_up(_what(unit), deaths[unit], result)
                if unit is not None:
                    suspects.append(unit)

    def _join(self) -> None:
        if self._is_joined:
            return
        is_local = self._config.cluster.address is None and "RAY_ADDRESS" not in os.environ
        ray.init(
            address=self._config.cluster.address,
            include_dashboard=False if is_local else None,
            # What Ray warns of in a cluster of this capture alone (its token, its dashboard) concerns nobody.
            logging_level=logging.ERROR if is_local else logging.WARNING,
            log_to_driver=False,
        )
        self._is_joined = True
        if is_local:
            _require_room(self._config)


def _require_room(config: CaptureConfig) -> None:
    """Raise `ClusterTooSmall` where no worker can ever start: this machine will not grow."""
    resources = ray.cluster_resources()
    for key, name in (("cpus_per_worker", "CPU"), ("gpus_per_worker", "GPU")):
        wanted, found = getattr(config.cluster, key) or 0, resources.get(name, 0)
        if wanted > found:
            raise ClusterTooSmall(
                f"cluster.{key}",
                found=f"{found:g} {name}s on this machine",
                wanted=f"at least {wanted:g}",
                fix=f"lower cluster.{key}, or join a cluster with cluster.address or RAY_ADDRESS",
            )


class _Pool:
    """Actors, what each is doing, and their replacements."""

    def __init__(self, config: CaptureConfig, *, actors: int, first: Any):
        """`first`: an actor that has its engine already, where there is one."""
        self._config = config
        self._load: dict[Any, int] = {}
        self._running: dict[Any, _Call] = {}
        for number in range(actors):
            self._start(first if number == 0 else None)

    @property
    def busy(self) -> bool:
        """Whether any unit is under way."""
        return any(call.unit is not None for call in self._running.values())

    def fill(self, waiting: deque[int], suspects: deque[int]) -> None:
        """Give units to actors that are ready, the least loaded first. A suspect goes alone to an idle actor."""
        while self._load and (waiting or suspects):
            actor = min(self._load, key=lambda actor: self._load[actor])
            if self._load[actor] >= _UNITS_PER_ACTOR:
                return
            if suspects and not self._load[actor]:
                self._send(actor, suspects.popleft(), weight=_UNITS_PER_ACTOR)
            elif waiting:
                self._send(actor, waiting.popleft(), weight=1)
            else:
                return

    def ended(self) -> Iterator[tuple[int | None, UnitReport | Exception | None]]:
        """What ended since the last call, waiting a second for the first: a unit with its report or error, or, as unit
        None, a worker's start with None or its error.

        A dead actor is replaced, and all that it had comes back with its error.
        """
        first, _ = ray.wait(list(self._running), num_returns=1, timeout=1.0)
        rest, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for reference in {*first, *rest}:
            call = self._running.pop(reference)
            try:
                result = ray.get(reference)
            except RayActorError as error:
                self._replace(call)
                yield call.unit, error
            except RayTaskError as error:
                yield call.unit, error
            else:
                if call.unit is None:
                    self._load[call.actor] = 0
                elif call.actor in self._load:  # its actor may have died over the next unit by now
                    self._load[call.actor] -= call.weight
                yield call.unit, None if call.unit is None else UnitReport(*result)

    def _send(self, actor: Any, unit: int, *, weight: int) -> None:
        self._running[actor.run.remote(unit)] = _Call(actor, unit, weight)
        self._load[actor] += weight

    def _replace(self, call: _Call) -> None:
        """Start another actor for a dead one, once for all the calls that it had."""
        if call.unit is None or self._load.pop(call.actor, None) is not None:
            # "Unavailable" may mean alive behind a broken connection; its late commits are harmless, its GPU is not.
            ray.kill(call.actor)
            self._start()

    def _start(self, actor: Any = None) -> None:
        actor = actor or _new_actor(self._config)
        self._running[actor.ready.remote()] = _Call(actor, None, 0)


class _Call(NamedTuple):
    """A call under way: of which actor, for which unit (none for its start), and how much of the actor it takes."""

    actor: Any
    unit: int | None
    weight: int


def _new_actor(config: CaptureConfig) -> Any:
    options: dict[str, Any] = {
        "num_cpus": config.cluster.cpus_per_worker,
        "num_gpus": config.cluster.gpus_per_worker or 0,
        # Whether a unit is tried again is for the dispatcher to say: Ray would send the same call to a new actor.
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    return _RayWorker.options(**options).remote(config.model_dump())  # type: ignore[attr-defined]


@ray.remote
class _RayWorker:
    """`CaptureWorker` as an actor. The engine is loaded in `ready`, so that its errors have a call to come back by."""

    def __init__(self, config: dict[str, Any]):
        self._config = CaptureConfig.model_validate(config)
        self._teacher: Teacher | None = None

    def rank_ids(self, header: bytes, unit: tuple[int, ...]) -> list[int]:
        facts = DatasetHeader.from_bytes(header, where="the pilot's header")
        self._teacher = load_teacher(self._config.teacher, facts)
        return list(rank_ids(self._config, self._teacher, facts, Unit(*unit)))

    def ready(self) -> None:
        self._worker = CaptureWorker(self._config, self._teacher)

    def run(self, unit: int) -> tuple[int, ...]:
        return tuple(self._worker.run(unit))


def _named(what: str, error: RayTaskError) -> Exception:
    """The worker's own error where it has a name; otherwise `UnitFailed` with its traceback."""
    cause = error.cause
    if isinstance(cause, ColdstillError):
        return cause
    return UnitFailed(what, found=str(error), wanted="no exception", fix="what was committed stays good")


def _given_up(what: str, deaths: int, last: Exception) -> UnitFailed:
    return UnitFailed(
        what,
        found=f"its worker died {deaths} times: {last}",
        wanted="a worker that lives through it",
        fix="see Ray's worker logs; what was committed stays good, start again to go on",
    )


def _what(unit: int | None) -> str:
    return "a worker's start" if unit is None else f"unit {unit}"
