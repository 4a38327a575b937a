"""One run in a process of its own, in which one fault happens; its end, and the counts of many such runs."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

from tqdm import tqdm

from coldstill.common.errors import ColdstillError
from tests.faults import KINDS, FaultPoints, Kind
from tests.forking import fork_server

from .moments import die_with_parent

AT_ONCE = 2
_KILLED = -9
_NEVER_ENDS_S = 300.0


@dataclass(frozen=True)
class Point:
    """Operation or request number `at`, and what happens to it."""

    at: int
    kind: str
    operation: str = ""

    def __str__(self) -> str:
        return f"{self.kind} at {self.at}, {self.operation}"


class Ended(NamedTuple):
    """How a run ended: the exit code of its process (0: done, 1: a named error), what it said, and its operations."""

    code: int
    said: str
    operations: list[str]

    @property
    def points(self) -> list[Point]:
        """Each operation of an unbroken run with each kind of fault."""
        if self.code:
            raise RuntimeError(f"an unbroken run failed: {self.said}")
        return [Point(at, kind, operation) for at, operation in enumerate(self.operations) for kind in KINDS]

    def wrong_after(self, point: Point) -> list[str]:
        """What is wrong with this end after the fault of `point`: a kill kills, and an error has a name."""
        allowed = (_KILLED,) if point.kind.startswith("kill") else (0, 1)
        return [] if self.code in allowed else [f"ended with code {self.code}: {self.said}"]


class Checked(NamedTuple):
    """A point, how the run with the fault ended (`Ended.code`), and the broken laws."""

    point: Point
    code: int
    wrong: list[str]


def run(
    work: Callable[[], object],
    root: str | None,
    *,
    at: int | None = None,
    kind: Kind = "kill",
    environment: Mapping[str, str] | None = None,
    killed_at: threading.Event | None = None,
) -> Ended:
    """Do `work` in a process of its own, with a fault at operation `at` below the folder `root`, or killed when
    `killed_at` is set. Without a `root` no operation is counted."""
    forks = fork_server()
    here, there = forks.Pipe(duplex=False)
    process = forks.Process(target=_live, args=(work, root, at, kind, dict(environment or {}), there))
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


def _live(
    work: Callable[[], object],
    root: str | None,
    at: int | None,
    kind: Kind,
    environment: dict[str, str],
    parent: Connection,
) -> None:
    die_with_parent()
    os.environ.update(environment)
    for stream in (1, 2):  # progress bars and tables; what went wrong goes to the parent
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    tqdm.set_lock(threading.RLock())
    points = FaultPoints(root or os.devnull, at=at, kind=kind)
    if root is not None:
        points.arm()
    code, said = 0, ""
    try:
        work()
    except ColdstillError as error:
        code, said = 1, str(error)
    except BaseException:
        code, said = 2, traceback.format_exc()
    parent.send((said, points.seen))
    os._exit(code)


def counts(checked: Iterable[Checked]) -> dict[str, dict[str, int]]:
    """By kind: the points, those that ended with a named error, and those after which the run went on."""
    ends: dict[str, list[int]] = {}
    for point, code, _ in checked:
        ends.setdefault(point.kind, []).append(code)
    return {
        kind: {"points": len(codes), "named errors": codes.count(1), "went on": codes.count(0)}
        for kind, codes in ends.items()
    }
