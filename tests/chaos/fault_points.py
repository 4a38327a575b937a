"""Captures in which one file operation fails or kills, or in which one request to an S3 store does.

Each point of a capture of four units is enumerated: an unbroken run counts them. After the fault the capture is run
again, and must then equal the unbroken one, whatever the first run made of it. A run that fails must name its error.

`python -m tests.chaos.fault_points` tries all points, which takes twenty minutes, and stores the counts.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from benchmarks.report import finish
from coldstill.common.errors import ColdstillError
from coldstill.pipeline.calibration import Calibration, calibrate
from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.worker import CaptureWorker, UnitReport, load_for
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.store import Store
from tests.faults import KINDS, FaultPoints, Kind
from tests.forking import fork_server
from tests.pipeline.capturing import OneWorkerPool, capture_config
from tests.storage_schema.store.s3_server import S3Server

from . import laws
from .bucket import bucket
from .moments import die_with_parent
from .teacher import LoadFakeTeacher

UNITS = 4
_AT_ONCE = 2
_KILLED = -9
_NEVER_ENDS_S = 300.0
RequestKind = Literal["kill before", "kill after", "503", "503 for long", "answer lost"]
REQUEST_KINDS: tuple[RequestKind, ...] = ("kill before", "kill after", "503", "503 for long", "answer lost")
_FOR_LONG = 12
"""Requests that fail one after the other: more than the client of the store repeats by itself."""


class Checked(NamedTuple):
    """A point, how the run with the fault ended (`Ended.code`), and the broken laws."""

    point: Point
    code: int
    wrong: list[str]


class Ended(NamedTuple):
    """How a run ended: the exit code of its process (0: sealed, 1: a named error), what it said, and its operations."""

    code: int
    said: str
    operations: list[str]


@dataclass(frozen=True)
class Point:
    """Operation or request number `at`, and what happens to it."""

    at: int
    kind: Kind | RequestKind
    operation: str = ""

    def __str__(self) -> str:
        return f"{self.kind} at {self.at}, {self.operation}"


class FakePool(OneWorkerPool):
    """One worker in this process, with the fake teacher."""

    def calibrate(self, header: DatasetHeader, unit: object) -> Calibration:
        """The calibration pass."""
        return calibrate(self._config, load_for(self._config, header, LoadFakeTeacher()), header, unit)  # type: ignore[arg-type]

    def run_units(self, todo: list[int]) -> Iterator[UnitReport]:
        """Run the units one after the other."""
        store = Store(self._config.output)
        header = DatasetHeader.from_bytes(store.read("dataset.json"), where="dataset.json")
        worker = CaptureWorker(self._config, load_for(self._config, header, LoadFakeTeacher()))
        yield from map(worker.run, todo)


def settings(folder: Path, output: str) -> CaptureConfig:
    """A capture of four units, one of them with a reject, into `output`, a path or URL."""
    cluster = {"cpus_per_worker": 0.5, "store_retry_s": 8}
    config = capture_config(folder, rows=4 * UNITS - 1, rows_per_unit=4, cluster=cluster)
    return config.model_copy(update={"output": output})


def run(
    config: CaptureConfig,
    *,
    at: int | None = None,
    kind: Kind = "kill",
    environment: Mapping[str, str],
    killed_at: threading.Event | None = None,
) -> Ended:
    """A capture in a process of its own, with a fault at operation `at`, or killed when `killed_at` is set."""
    forks = fork_server()
    here, there = forks.Pipe(duplex=False)
    process = forks.Process(target=_live, args=(config, at, kind, dict(environment), there))
    process.start()
    there.close()
    if killed_at is not None:
        while process.is_alive() and not killed_at.wait(0.05):
            pass
        process.kill()
    with here:
        try:
            said, operations = here.recv()
        except EOFError:
            said, operations = "", []
    process.join(_NEVER_ENDS_S)
    if process.is_alive():
        process.kill()
        return Ended(2, "did not end", operations)
    return Ended(process.exitcode or 0, said, operations)


def _live(config: CaptureConfig, at: int | None, kind: Kind, environment: dict[str, str], parent: Connection) -> None:
    die_with_parent()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars; what went wrong goes to the parent
    tqdm.set_lock(threading.RLock())
    pool.WorkerPool = FakePool  # type: ignore[misc]
    points = FaultPoints(config.output, at=at, kind=kind)
    if not environment:
        points.arm()
    code, said = 0, ""
    try:
        capture(config)
    except ColdstillError as error:
        code, said = 1, str(error)
    except BaseException:
        code, said = 2, traceback.format_exc()
    parent.send((said, points.seen))
    os._exit(code)


def local_points(folder: Path) -> list[Point]:
    """All fault points of a capture onto a local disk, which also writes the unbroken dataset."""
    ended = run(settings(folder, str(folder / "unbroken")), environment={})
    if ended.code:
        raise RuntimeError(f"an unbroken capture failed: {ended.said}")
    return [Point(at, kind, operation) for at, operation in enumerate(ended.operations) for kind in KINDS]


def check_local(folder: Path, point: Point) -> Checked:
    """A capture with this fault, the run that follows, and what is wrong then."""
    config = settings(folder, str(folder / f"{point.at}-{point.kind}"))
    first = run(config, at=point.at, kind=point.kind, environment={})  # type: ignore[arg-type]
    return _after(point, config, first, folder, environment={})


def s3_points(folder: Path, root: str, server: S3Server, environment: Mapping[str, str]) -> list[Point]:
    """All fault points of a capture to the bucket `root`. `local_points` has written the unbroken dataset."""
    server.forget()
    ended = run(settings(folder, f"{root}/unbroken"), environment=environment)
    if ended.code:
        raise RuntimeError(f"an unbroken capture failed: {ended.said}")
    names = [path.rpartition("unbroken/")[2] for method, path in server.requests if method == "PUT"]
    return [Point(at, kind, name) for at, name in enumerate(names) for kind in REQUEST_KINDS]


def check_s3(folder: Path, root: str, server: S3Server, environment: Mapping[str, str], point: Point) -> Checked:
    """The same for a request to the store. Only one of these runs at a time: the server's faults are shared."""
    config = settings(folder, f"{root}/{point.at}-{point.kind.replace(' ', '-')}")
    is_kill = point.kind.startswith("kill")
    server.forget()
    fault = server.fail(
        "PUT",
        "",
        "503 Service Unavailable",
        "ServiceUnavailable",
        after=point.at,
        applied=point.kind in ("kill after", "answer lost"),
        held=is_kill,
        times=_FOR_LONG if point.kind == "503 for long" else 1,
    )
    first = run(config, environment=environment, killed_at=fault.arrived if is_kill else None)
    fault.released.set()
    server.forget()
    return _after(point, config, first, folder, environment=environment)


def _after(
    point: Point, config: CaptureConfig, first: Ended, folder: Path, *, environment: Mapping[str, str]
) -> Checked:
    allowed = (_KILLED,) if point.kind.startswith("kill") else (0, 1)
    wrong = [] if first.code in allowed else [f"ended with code {first.code}: {first.said}"]
    wrong += laws.half_written(Store(config.output))
    again = run(config, environment=environment)
    if again.code:
        return Checked(point, first.code, [*wrong, f"the next run ended with code {again.code}: {again.said}"])
    compared = laws.compare(config.output, str(folder / "unbroken"))
    if compared.lost or compared.doubled:
        wrong.append(f"{compared.lost} rows lost, {compared.doubled} doubled")
    wrong += compared.wrong
    if not wrong:
        shutil.rmtree(config.output, ignore_errors=True)
    return Checked(point, first.code, wrong)


def main() -> int:
    """Try all points and print the counts. The exit code is 1 if a law was broken."""
    checked: list[Checked] = []
    with tempfile.TemporaryDirectory() as name, bucket() as (root, environment, server):
        folder = Path(name)
        local = local_points(folder)
        remote = s3_points(folder, root, server, environment)
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            results = threads.map(partial(check_local, folder), local)
            checked += tqdm(results, desc="local disk", total=len(local), unit=" points", mininterval=2)
        results = map(partial(check_s3, folder, root, server, environment), remote)
        checked += tqdm(results, desc="S3", total=len(remote), unit=" points", mininterval=2)
    for point, code, wrong in checked:
        for what in wrong:
            print(f"{point}: {what}" if code else f"{point}, tolerated: {what}", file=sys.stderr)
    places = {"local disk": checked[: len(local)], "S3": checked[len(local) :]}
    figures = {
        "points": len(checked),
        "wrong": sum(bool(wrong) for _, _, wrong in checked),
        **{
            f"{place}, {kind}": {
                "points": len(of_kind),
                "named errors": sum(code == 1 for _, code, _ in of_kind),
                "went on": sum(code == 0 for _, code, _ in of_kind),
            }
            for place, found in places.items()
            for kind in dict.fromkeys(each.point.kind for each in found)
            for of_kind in [[each for each in found if each.point.kind == kind]]
        },
    }
    finish("fault_points", figures, command="make fault-points", quick=False)
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
