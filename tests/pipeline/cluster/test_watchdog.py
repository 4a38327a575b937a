"""Laws of the watchdog: real threads, real processes, real exits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from coldstill.pipeline.cluster.attempts import CrashReport
from coldstill.pipeline.cluster.watchdog import Watchdog, WatchedTeacher, is_memory_error
from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.protocol import ScoredSequence


class Stub:
    """A teacher whose `score` runs the given function."""

    environment: dict[str, object] = {}

    def __init__(self, call: Callable[[], object] = lambda: None):
        self.call, self.progress, self.processes = call, 0, ()

    def score(self, sequences: object) -> list[ScoredSequence]:
        self.call()
        return []


@contextmanager
def _watched(stub: Stub, *, hung_after_s: float) -> Iterator[list[CrashReport]]:
    reports: list[CrashReport] = []
    teacher = WatchedTeacher(stub, on_exit=reports.append)  # type: ignore[arg-type]
    watchdog = Watchdog(teacher, hung_after_s=hung_after_s, on_exit=reports.append)
    watchdog.start()
    call = threading.Thread(target=teacher.score, args=([],), daemon=True)
    call.start()
    try:
        yield reports
        call.join(20)
    finally:
        watchdog.stop()


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def test_a_call_without_progress_is_reported_as_hung_once() -> None:
    released = threading.Event()
    with _watched(Stub(released.wait), hung_after_s=0.2) as reports:
        _wait_for(lambda: reports)
        released.set()
    assert [crash.reason.partition(":")[0] for crash in reports] == ["hung"]


@pytest.mark.parametrize("broken", ["progress", "processes"])
def test_an_engine_whose_progress_cannot_be_read_ends_the_worker(broken: str) -> None:
    """Its calls would never be found hung."""

    class Broken(Stub):
        is_broken = False

        def __getattribute__(self, name: str) -> object:
            if name == broken and self.is_broken:
                raise AttributeError("no such counter")
            return super().__getattribute__(name)

    released = threading.Event()
    with _watched(Broken(released.wait), hung_after_s=0.2) as reports:
        Broken.is_broken = True
        _wait_for(lambda: reports)
        released.set()
    assert [crash.reason for crash in reports] == ["AttributeError: no such counter"]


def test_a_long_call_that_makes_progress_is_not_hung_nor_is_an_idle_engine() -> None:
    stub = Stub()

    def work() -> None:
        for _ in range(40):
            stub.progress += 1
            time.sleep(0.05)

    stub.call = work
    with _watched(stub, hung_after_s=1.0) as reports:
        pass
    with _watched(Stub(), hung_after_s=0.2) as of_idle:
        time.sleep(1)
    assert reports == of_idle == []


@pytest.mark.parametrize("is_reaped", [False, True])
def test_a_lost_process_of_the_engine_is_reported(is_reaped: bool) -> None:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    released, stub = threading.Event(), Stub()
    stub.call, stub.processes = released.wait, (helper.pid,)
    with _watched(stub, hung_after_s=60) as reports:
        time.sleep(0.1)
        assert reports == []
        helper.kill()
        if is_reaped:
            helper.wait()
        _wait_for(lambda: reports)
        released.set()
    helper.wait()
    assert reports[0].reason == f"process {helper.pid} of the engine is gone"


def test_a_coldstill_error_is_passed_on_and_any_other_exception_ends_the_worker() -> None:
    reports: list[CrashReport] = []

    def fail_with(error: Exception) -> WatchedTeacher:
        def fail() -> None:
            raise error

        return WatchedTeacher(Stub(fail), on_exit=reports.append)  # type: ignore[arg-type]

    with pytest.raises(TeacherOutputInvalid):
        fail_with(TeacherOutputInvalid("logits")).score([])
    assert reports == []
    with pytest.raises(KeyError):
        fail_with(KeyError("x")).score([])
    assert reports == [CrashReport(cause="the engine raised KeyError", reason="KeyError: 'x'")]


def test_memory_errors_are_recognized_by_class_by_message_and_as_causes() -> None:
    torch_like = type("OutOfMemoryError", (RuntimeError,), {})
    assert is_memory_error(torch_like("no"))
    assert is_memory_error(MemoryError())
    assert is_memory_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    wrapped = RuntimeError("EngineCore encountered an issue")
    wrapped.__cause__ = torch_like("CUDA out of memory")
    assert is_memory_error(wrapped)
    assert not is_memory_error(KeyError("x"))


_HOLDS_THE_LOCK = """
import re, time
from coldstill.pipeline.cluster.watchdog import Watchdog, WatchedTeacher
from tests.pipeline.cluster.test_watchdog import Stub

def hang():
    time.sleep(0.5)
    re.match("(a*)*b", "a" * 64)

teacher = WatchedTeacher(Stub(hang), on_exit=print)
Watchdog(teacher, hung_after_s=0.8, on_exit=print).start()
teacher.score([])
"""


def test_a_call_that_hangs_with_the_gil_held_is_killed_too() -> None:
    """No Python thread can run beside it, so a timer in C ends the process."""
    ended = subprocess.run([sys.executable, "-c", _HOLDS_THE_LOCK], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
