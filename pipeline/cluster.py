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
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayTaskError

from storage_schema.errors import ColdstillError

from .config import CaptureConfig
from .errors import ClusterTooSmall, UnitFailed
from .worker import CaptureWorker, UnitReport

_UNITS_PER_ACTOR = 2
_DEATHS = 2
"""How often a worker may die over one unit, or at its start, before the capture ends. A worker had up to two units when
it died: both are tried again alone, so that a healthy unit is not blamed for its neighbour a second time."""


@contextmanager
def cluster(config: CaptureConfig) -> Iterator[None]:
    """Join the cluster that the settings or RAY_ADDRESS name, or start one on this machine; leave it afterwards."""
    is_local = config.cluster.address is None and "RAY_ADDRESS" not in os.environ
    ray.init(
        address=config.cluster.address,
        include_dashboard=False if is_local else None,
        # What Ray warns of in a cluster that lives for this capture alone (its token, its dashboard) concerns nobody.
        logging_level=logging.ERROR if is_local else logging.WARNING,
        log_to_driver=False,
    )
    try:
        if is_local:
            _require_room(config)
        yield
    finally:
        ray.shutdown()


def _require_room(config: CaptureConfig) -> None:
    """Raise `ClusterTooSmall` where no worker can ever start: this machine will not grow."""
    resources = ray.cluster_resources()
    for key, name in (("cpus_per_worker", "CPU"), ("gpus_per_worker", "GPU")):
        wanted, found = getattr(config.cluster, key), resources.get(name, 0)
        if wanted > found:
            raise ClusterTooSmall(
                f"cluster.{key}",
                found=f"{found:g} {name}s on this machine",
                wanted=f"at least {wanted:g}",
                fix=f"lower cluster.{key}, or join a cluster with cluster.address or RAY_ADDRESS",
            )


def run_units(todo: list[int], config: CaptureConfig) -> Iterator[UnitReport]:
    """Do the units on up to `cluster.workers` actors.

    Raises a worker's own named error, or `UnitFailed` for a unit whose worker died twice while it was alone there.
    """
    pool = _Pool(config, actors=min(config.cluster.workers, len(todo)))
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
                raise _named(unit, result)
            deaths[unit] += 1
            if deaths[unit] > _DEATHS:
                raise UnitFailed(
                    _what(unit),
                    found=f"its worker died {deaths[unit]} times: {result}",
                    wanted="a worker that lives through it",
                    fix="see Ray's worker logs; what was committed stays good, start again to go on",
                )
            if unit is not None:
                suspects.append(unit)


class _Pool:
    """Actors, what each is doing, and their replacements."""

    def __init__(self, config: CaptureConfig, *, actors: int):
        self._options: dict[str, Any] = {
            "num_cpus": config.cluster.cpus_per_worker,
            "num_gpus": config.cluster.gpus_per_worker,
            # Whether a unit is tried again is for the dispatcher to say: Ray would send the same call to a new actor.
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        self._config = config.model_dump()
        self._load: dict[Any, int] = {}
        self._running: dict[Any, _Call] = {}
        for _ in range(actors):
            self._start()

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

    def _start(self) -> None:
        actor = _RayWorker.options(**self._options).remote(self._config)  # type: ignore[attr-defined]
        self._running[actor.ready.remote()] = _Call(actor, None, 0)


class _Call(NamedTuple):
    """A call under way: of which actor, for which unit (none for its start), and how much of the actor it takes."""

    actor: Any
    unit: int | None
    weight: int


@ray.remote
class _RayWorker:
    """`CaptureWorker` as an actor. The engine is loaded in `ready`, so that its errors have a call to come back by."""

    def __init__(self, config: dict[str, Any]):
        self._config = CaptureConfig.model_validate(config)

    def ready(self) -> None:
        self._worker = CaptureWorker(self._config)

    def run(self, unit: int) -> tuple[int, ...]:
        return tuple(self._worker.run(unit))


def _named(unit: int | None, error: RayTaskError) -> Exception:
    """The worker's own error where it has a name; otherwise `UnitFailed` with its traceback."""
    cause = error.cause
    if isinstance(cause, ColdstillError):
        return cause
    return UnitFailed(_what(unit), found=str(error), wanted="no exception", fix="what was committed stays good")


def _what(unit: int | None) -> str:
    return "a worker's start" if unit is None else f"unit {unit}"
