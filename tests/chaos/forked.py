"""Captures without Ray: one to three processes share a dataset directory and are killed at seeded moments.

The first process also does the driver's part: it prepares and it seals. All run units, each in its own order and in two
threads. So two processes sometimes run the same unit, as the last workers of a dead driver do. Processes are forked
from one that has imported everything: a start costs a tenth of a second.
"""

from __future__ import annotations

import multiprocessing.process
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from tqdm import tqdm

from coldstill.pipeline.calibration import calibrate
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.teachers.protocol import Teacher
from coldstill.pipeline.worker import CaptureWorker, load_for
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.storage_schema.store import Store
from tests.forking import fork_server

from .moments import Moment, Phase, die_with_parent, random_moment
from .teacher import LoadFakeTeacher

MOST_WORKERS = 3
_THREADS = 2
"""Units at a time per process, as in the Ray actor."""
_CALL_S = 0.008
_PHASES: tuple[Phase, ...] = ("start", "units", "seal")
_WEIGHTS = (2, 7, 1)
_SPARED = 0.05
"""Share of processes that are not killed."""
_KILLED = -9
_NEVER_ENDS_S = 300.0


class Start(NamedTuple):
    """The result of one start: processes `killed`, whether the capture `finished`, and errors (`wrong`)."""

    killed: int
    finished: bool
    wrong: list[str]


def start(
    config: CaptureConfig, rng: random.Random, *, at_most: int, environment: Mapping[str, str] | None = None
) -> Start:
    """Start or resume a capture, and kill up to `at_most` of its processes.

    `environment`: variables for the processes, which are forked from a process that was started before.
    """
    store = Store(config.output)
    is_begun = store.exists(PLAN_NAME) and not store.exists(MANIFEST_NAME)
    moments: list[Moment | None] = []
    for number in range(rng.randint(1, MOST_WORKERS) if is_begun else 1):
        phase = "units" if number else rng.choices(_PHASES, _WEIGHTS)[0]
        moment = random_moment(rng, phase, has_steps=store.is_local)
        is_spared = number >= at_most or rng.random() < _SPARED
        moments.append(None if is_spared else moment)
    exits = _run(config, moments, seed=rng.randrange(1 << 30), environment=environment or {})
    wrong = [f"a process ended with code {code}" for code in exits if code not in (0, _KILLED)]
    return Start(exits.count(_KILLED), finished=exits[0] == 0, wrong=wrong)


def run_unbroken(config: CaptureConfig) -> None:
    """The same capture by one process that is not killed."""
    (code,) = _run(config, [None], seed=0, environment={})
    if code:
        raise RuntimeError(f"an unbroken capture ended with code {code}")


def _run(
    config: CaptureConfig, moments: Sequence[Moment | None], *, seed: int, environment: Mapping[str, str]
) -> list[int]:
    """Exit codes of the processes, the driver's first."""
    forks = fork_server()
    started = []
    for number, moment in enumerate(moments):
        here, there = forks.Pipe(duplex=False)
        process = forks.Process(
            target=_live,
            args=(config, moment, there),
            kwargs={"seed": seed + number, "is_driver": number == 0, "environment": environment},
        )
        process.start()
        there.close()
        killer = threading.Thread(target=_kill, args=(process, here, moment))
        killer.start()
        started.append((process, killer))
    exits = []
    for process, killer in started:
        process.join(_NEVER_ENDS_S)
        if process.is_alive():
            raise RuntimeError(f"a process did not end within {_NEVER_ENDS_S:.0f} s")
        killer.join()
        exits.append(process.exitcode or 0)
    return exits


def _kill(process: multiprocessing.process.BaseProcess, begun: Connection, moment: Moment | None) -> None:
    with begun, suppress(EOFError):  # the process died before its moment
        begun.recv()
        if moment and moment.seconds is not None:
            time.sleep(moment.seconds)
            process.kill()


def _live(
    config: CaptureConfig,
    moment: Moment | None,
    parent: Connection,
    *,
    seed: int,
    is_driver: bool,
    environment: Mapping[str, str],
) -> None:
    """The whole life of a process."""
    die_with_parent()
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which would stay behind after a kill

    def begin(phase: Phase) -> None:
        if moment and moment.phase == phase:
            moment.arm(config.output, tell=lambda: parent.send(phase))

    def fake(header: DatasetHeader) -> Teacher:
        return load_for(config, header, LoadFakeTeacher(_CALL_S))

    begin("start")
    if is_driver:
        prepare(config, rank_ids=lambda header, unit: calibrate(config, fake(header), header, unit).id_ranks)
    store = Store(config.output)
    if not store.exists(MANIFEST_NAME):
        header = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
        worker = CaptureWorker(config, fake(header))
        begin("units")
        units = [unit.index for unit in plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)]
        random.Random(seed).shuffle(units)
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(worker.run, units))
    if is_driver:
        begin("seal")
        seal(store)
