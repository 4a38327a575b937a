"""Captures in which one file operation fails or kills, or in which one request to an S3 store does.

Each point of a capture of four units is enumerated: an unbroken run counts them. After the fault the capture is run
again, and must then equal the unbroken one, whatever the first run made of it. A run that fails must name its error.

`python -m tests.chaos.fault_points` tries all points, which takes twenty minutes, and stores the counts.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.common.report import finish
from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.config import CaptureConfig
from coldstill.storage_schema.store import Store
from tests.pipeline.capturing import OneWorkerPool, capture_config
from tests.storage_schema.store.s3_server import S3Server

from . import laws
from .bucket import bucket
from .one_fault import AT_ONCE, Checked, Ended, Point, counts, run
from .teacher import LoadFakeTeacher

UNITS = 4
RequestKind = Literal["kill before", "kill after", "503", "503 for long", "answer lost"]
REQUEST_KINDS: tuple[RequestKind, ...] = ("kill before", "kill after", "503", "503 for long", "answer lost")
_FOR_LONG = 12
"""Requests that fail one after the other: more than the client of the store repeats by itself."""


def settings(folder: Path, output: str) -> CaptureConfig:
    """A capture of four units, one of them with a reject, into `output`, a path or URL."""
    cluster = {"cpus_per_worker": 0.5, "store_retry_s": 8}
    config = capture_config(folder, rows=4 * UNITS - 1, rows_per_unit=4, cluster=cluster)
    return config.model_copy(update={"output": output})


def _capture(config: CaptureConfig) -> None:
    """In this process: one worker with the fake teacher."""
    pool.WorkerPool = partial(OneWorkerPool, load=LoadFakeTeacher())  # type: ignore[assignment, misc]
    capture(config)


def _run(config: CaptureConfig, environment: Mapping[str, str], **fault: Any) -> Ended:
    root = None if environment else config.output
    return run(partial(_capture, config), root, environment=environment, **fault)


def local_points(folder: Path) -> list[Point]:
    """All fault points of a capture onto a local disk, which also writes the unbroken dataset."""
    return _run(settings(folder, str(folder / "unbroken")), {}).points


def check_local(folder: Path, point: Point) -> Checked:
    """A capture with this fault, the run that follows, and what is wrong then."""
    config = settings(folder, str(folder / f"{point.at}-{point.kind}"))
    first = _run(config, {}, at=point.at, kind=point.kind)
    return _after(point, config, first, folder, environment={})


def s3_points(folder: Path, root: str, server: S3Server, environment: Mapping[str, str]) -> list[Point]:
    """All fault points of a capture to the bucket `root`. `local_points` has written the unbroken dataset."""
    server.forget()
    ended = _run(settings(folder, f"{root}/unbroken"), environment)
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
    first = _run(config, environment, killed_at=fault.arrived if is_kill else None)
    fault.released.set()
    server.forget()
    return _after(point, config, first, folder, environment=environment)


def _after(
    point: Point, config: CaptureConfig, first: Ended, folder: Path, *, environment: Mapping[str, str]
) -> Checked:
    wrong = [*first.wrong_after(point), *laws.half_written(Store(config.output))]
    again = _run(config, environment)
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
        with ThreadPoolExecutor(AT_ONCE) as threads:
            results = threads.map(partial(check_local, folder), local)
            checked += tqdm(results, desc="local disk", total=len(local), unit=" points", mininterval=2)
        results = map(partial(check_s3, folder, root, server, environment), remote)
        checked += tqdm(results, desc="S3", total=len(remote), unit=" points", mininterval=2)
    for point, code, wrong in checked:
        for what in wrong:
            print(f"{point}: {what}" if code else f"{point}, tolerated: {what}", file=sys.stderr)
    places = {"local disk": checked[: len(local)], "S3": checked[len(local) :]}
    figures: dict[str, Any] = {"points": len(checked), "wrong": sum(bool(wrong) for _, _, wrong in checked)}
    for place, found in places.items():
        figures |= {f"{place}, {kind}": count for kind, count in counts(found).items()}
    finish("fault_points", figures, command="make fault-points", quick=False)
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
