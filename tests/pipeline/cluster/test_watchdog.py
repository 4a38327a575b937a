"""Laws of the watchdog: real threads, real processes, real exits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from coldstill.pipeline.cluster.watchdog import Watchdog, WatchedTeacher, is_memory_error
from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.sequences import ScoredSequence
from coldstill.pipeline.units.attempts import LastWords


class Stub:
    """A teacher whose one call is the function that it is given."""

    environment: dict[str, object] = {}

    def __init__(self, call: Callable[[], object] = lambda: None):
        self.call, self.progress, self.processes = call, 0, ()

    def score(self, sequences: object) -> list[ScoredSequence]:
        self.call()
        return []


@contextmanager
def _watched(stub: Stub, *, hung_after_s: float) -> Iterator[list[LastWords]]:
    said: list[LastWords] = []
    teacher = WatchedTeacher(stub, end=said.append)  # type: ignore[arg-type]
    watchdog = Watchdog(teacher, hung_after_s=hung_after_s, end=said.append)
    watchdog.start()
    call = threading.Thread(target=teacher.score, args=([],), daemon=True)
    call.start()
    try:
        yield said
        call.join(20)
    finally:
        watchdog.stop()


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_call_without_progress_is_hung_and_said_to_be_once() -> None:
    released = threading.Event()
    with _watched(Stub(released.wait), hung_after_s=0.2) as said:
        _wait_for(lambda: said)
        released.set()
    assert [words.reason.partition(":")[0] for words in said] == ["hung"]


def test_a_long_call_that_makes_progress_is_not_hung_nor_is_an_idle_engine() -> None:
    stub = Stub()

    def work() -> None:
        for _ in range(40):
            stub.progress += 1
            time.sleep(0.05)

    stub.call = work
    with _watched(stub, hung_after_s=1.0) as said:
        pass
    with _watched(Stub(), hung_after_s=0.2) as said_by_idle:
        time.sleep(1)
    assert said == said_by_idle == []


@pytest.mark.parametrize("is_reaped", [False, True])
def test_a_process_of_the_engine_that_is_gone_is_noticed(is_reaped: bool) -> None:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    released, stub = threading.Event(), Stub()
    stub.call, stub.processes = released.wait, (helper.pid,)
    with _watched(stub, hung_after_s=60) as said:
        time.sleep(0.1)
        assert said == []
        helper.kill()
        if is_reaped:
            helper.wait()
        _wait_for(lambda: said)
        released.set()
    helper.wait()
    assert said[0].reason == f"process {helper.pid} of the engine is gone"


def test_what_has_no_name_is_the_end_and_what_has_one_is_passed_on() -> None:
    said: list[LastWords] = []

    def fail_with(error: Exception) -> WatchedTeacher:
        def fail() -> None:
            raise error

        return WatchedTeacher(Stub(fail), end=said.append)  # type: ignore[arg-type]

    with pytest.raises(TeacherOutputInvalid):
        fail_with(TeacherOutputInvalid("logits")).score([])
    assert said == []
    with pytest.raises(KeyError):
        fail_with(KeyError("x")).score([])
    assert said == [LastWords(cause="the engine raised KeyError", reason="KeyError: 'x'")]


def test_memory_errors_are_known_by_their_class_by_their_words_and_behind_others() -> None:
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

teacher = WatchedTeacher(Stub(hang), end=print)
Watchdog(teacher, hung_after_s=0.8, end=print).start()
teacher.score([])
"""


def test_a_call_that_hangs_with_the_interpreters_lock_ends_too() -> None:
    """No thread of Python runs beside it: a timer in C is the last resort."""
    ended = subprocess.run([sys.executable, "-c", _HOLDS_THE_LOCK], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
