"""Captures on real Ray whose driver and workers are killed at seeded moments; each start has its own cluster.

Killing a worker kills its engine in the middle of a call. The driver is killed either alone, so that Ray's processes
must detect it, or together with its process group.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil

from coldstill.pipeline.config import CaptureConfig
from coldstill.storage_schema.commits import committed_units
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.store import Store
from tests.pipeline.capturing import write_config

from .forked import MOST_WORKERS, Start

REPOSITORY = Path(__file__).parents[2]
Victim = Literal["worker", "driver", "group"]

_MOST_WORKER_KILLS = 2
"""In one start: three deaths in a row, before any unit is done, would end the driver with an error, as they should."""
_MOST_COMMITS = 6
_LONGEST_PAUSE_S = 0.5
_LONGEST_EARLY_S = 8.0
_NEVER_ENDS_S = 900.0
_KILLED = -9


def start(config: CaptureConfig, rng: random.Random, *, at_most: int, teacher: Literal["fake", "real"]) -> Start:
    """Start or resume a capture with a random number of workers; kill up to `at_most` times."""
    workers = rng.randint(1, MOST_WORKERS)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_workers": workers})})
    path = write_config(Path(f"{config.output}.yaml"), config)
    log = Path(f"{config.output}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.ray_driver", str(path), teacher],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            start_new_session=True,
        )
    victims: list[Victim] = ["worker"] * rng.randint(0, _MOST_WORKER_KILLS)
    if rng.random() < 0.8:
        victims.append(rng.choice(("driver", "group")))
    killed = 0
    try:
        for victim in victims[:at_most]:
            killed += _kill(victim, process, rng, store=Store(config.output))
        code = process.wait(_NEVER_ENDS_S)
    except BaseException:
        _end_group(process)
        raise
    wrong = [] if code in (0, _KILLED) else [f"the driver ended with code {code}: {log.read_text()[-2000:]}"]
    return Start(killed, finished=code == 0, wrong=wrong)


def _kill(victim: Victim, process: subprocess.Popen[bytes], rng: random.Random, *, store: Store) -> bool:
    """Wait for a random moment and kill the victim. Whether it was still running."""
    if rng.random() < 0.25:  # while it starts, or just after the last kill
        if victim == "worker":
            _wait(process, lambda: bool(_workers(process)))
        pause = rng.uniform(0, _LONGEST_EARLY_S)
    else:
        wanted = len(committed_units(store)) + rng.randint(1, _MOST_COMMITS)
        _wait(process, lambda: len(committed_units(store)) >= wanted or store.exists(MANIFEST_NAME))
        pause = rng.uniform(0, _LONGEST_PAUSE_S)
    with suppress(subprocess.TimeoutExpired):
        process.wait(pause)
    if process.poll() is not None:
        return False
    if victim == "driver":
        process.kill()
    elif victim == "group":
        _end_group(process)
    else:
        return _kill_worker(process, rng)
    return True


def _kill_worker(process: subprocess.Popen[bytes], rng: random.Random) -> bool:
    workers = _workers(process)
    if not workers:
        return False
    with suppress(psutil.NoSuchProcess):
        victim = rng.choice(workers)
        victim.kill()
        victim.wait(10)
        return True
    return False


def _workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The actor processes of a capture, by the process titles that Ray sets."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "ray::_RayWorker" in " ".join(child.cmdline()):
                    found.append(child)
    return sorted(found, key=lambda worker: worker.pid)


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.01)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
