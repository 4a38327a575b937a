"""Kills a worker whose engine is hung, dead or in an unknown state.

A call that never returns cannot report itself, so a thread beside it watches its progress. A hung engine needs a new
process. The worker writes a crash report (`attempts.CrashReport`), kills the engine's processes, which hold the GPU
that the next worker needs, and exits. The driver counts a death.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psutil

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.teachers.protocol import ScoreResult, Teacher, TokenSequence

from .attempts import CrashReport

_MAX_CHECK_INTERVAL_S = 2.0
_REPORT_TIMEOUT_S = 20.0
"""A store that does not respond must not keep a hung worker alive."""
_MEMORY_ERRORS = {"MemoryError", "OutOfMemoryError"}
_MEMORY_TEXTS = ("out of memory", "can't allocate memory")
_STANDARD_ERROR = 2

OnExit = Callable[[CrashReport], None]

logger = logging.getLogger(__name__)


class WatchedTeacher:
    """A `protocol.Teacher` that counts its calls.

    An exception that is not a `ColdstillError` leaves the engine in an unknown state. It ends the worker, as a crash of
    the engine would: `on_exit` is called with a report of the exception.
    """

    def __init__(self, teacher: Teacher, *, on_exit: OnExit):
        self._teacher, self._on_exit = teacher, on_exit
        self._lock = threading.Lock()
        self._begun = self._ended = 0

    @property
    def environment(self) -> dict[str, Any]:
        """See `protocol.Teacher`."""
        return self._teacher.environment

    @property
    def progress(self) -> int:
        """See `protocol.Teacher`."""
        return self._teacher.progress

    @property
    def processes(self) -> tuple[int, ...]:
        """See `protocol.Teacher`."""
        return self._teacher.processes

    @property
    def is_busy(self) -> bool:
        """Whether a call is in progress."""
        return self._begun > self._ended

    @property
    def activity(self) -> tuple[int, int, int]:
        """Numbers that change while the engine makes progress."""
        return self._teacher.progress, self._begun, self._ended

    def score(self, sequences: Sequence[TokenSequence]) -> Sequence[ScoreResult]:
        """See `protocol.Teacher`."""
        with self._counted():
            return self._teacher.score(sequences)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._begun += 1
        try:
            yield
        except ColdstillError:
            raise
        except Exception as error:
            logger.exception("the teacher raised an exception that is not a ColdstillError")
            self._on_exit(_crash_report(error))
            raise
        finally:
            with self._lock:
                self._ended += 1


class Watchdog(threading.Thread):
    """Checks a teacher until the process ends. Calls `on_exit` once, when its calls will never return."""

    def __init__(self, teacher: WatchedTeacher, *, hung_after_s: float, on_exit: OnExit):
        super().__init__(name="watchdog", daemon=True)
        self._teacher, self._hung_after_s, self._on_exit = teacher, hung_after_s, on_exit
        self._processes: dict[int, psutil.Process] = {}
        self._interval_s = min(_MAX_CHECK_INTERVAL_S, hung_after_s / 4)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Stop the checks."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Check until `stop` is called."""
        try:
            self._watch()
        except Exception as error:  # of the engine's own `progress` or `processes`: a hung call would never be found
            logger.exception("the teacher's progress cannot be read")
            self._on_exit(_crash_report(error))
        finally:  # a timer that is left running would kill this process much later
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        quiet_s, last = 0.0, self._teacher.activity
        while not self._stopped.wait(self._interval_s):
            activity = self._teacher.activity
            quiet_s = quiet_s + self._interval_s if self._teacher.is_busy and activity == last else 0.0
            last = activity
            self._arm_exit_timer()
            crash = self._lost_process()
            if crash is None and quiet_s >= self._hung_after_s:
                crash = CrashReport(cause="the engine hung", reason=f"hung: no progress for {quiet_s:.0f} s")
            if crash:
                faulthandler.dump_traceback(file=_STANDARD_ERROR)
                self._on_exit(crash)
                return

    def _arm_exit_timer(self) -> None:
        """A call that hangs while it holds the GIL blocks this thread too. Then a timer in C ends the process."""
        if self._teacher.is_busy:
            faulthandler.dump_traceback_later(2 * self._hung_after_s, exit=True, file=_STANDARD_ERROR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _lost_process(self) -> CrashReport | None:
        for pid in self._teacher.processes:
            try:
                process = self._processes.setdefault(pid, psutil.Process(pid))
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            except psutil.NoSuchProcess:
                pass
            return CrashReport(cause="a process of the engine died", reason=f"process {pid} of the engine is gone")
        return None


def end_process(crash: CrashReport, *, teacher: Teacher | None, on_exit: OnExit) -> NoReturn:
    """Call `on_exit`, then kill the engine's processes and this one at once, without any clean-up that could hang."""
    logger.error("this worker ends itself: %s", crash.reason)
    reporter = threading.Thread(target=on_exit, args=(crash,), daemon=True)
    reporter.start()
    reporter.join(_REPORT_TIMEOUT_S)
    for pid in teacher.processes if teacher else ():
        with suppress(psutil.Error):
            psutil.Process(pid).kill()
    os._exit(1)


def _crash_report(error: Exception) -> CrashReport:
    name, is_memory = type(error).__name__, is_memory_error(error)
    return CrashReport(
        cause="out of memory" if is_memory else f"the engine raised {name}",
        reason=f"{name}: {error}",
        out_of_memory=is_memory,
    )


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception or one of its causes is an out-of-memory error. torch's class is matched by its name: the
    engine may run without torch."""
    cause: BaseException | None = error
    while cause is not None:
        names = {cls.__name__ for cls in type(cause).__mro__}
        if names & _MEMORY_ERRORS or any(text in str(cause).lower() for text in _MEMORY_TEXTS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
