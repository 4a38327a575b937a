"""Ends a worker whose engine is hung, dead or no longer to be trusted. A teacher in; the same teacher, watched, out.

Nothing inside a call that never returns can say so: a thread looks from beside it, and the only cure for an engine that
does not answer is a new process. The worker says why (`attempts.LastWords`), takes the engine's processes with it, for
they hold the GPU that the next worker needs, and ends; the driver counts a death.
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
from coldstill.pipeline.sequences import ScoredSequence, TokenSequence
from coldstill.pipeline.teachers.protocol import Teacher
from coldstill.pipeline.units.attempts import LastWords

_LONGEST_LOOK_S = 2.0
"""Seconds between two looks, at most."""
_SPEAKING_S = 20.0
"""A store that does not answer must not keep a hung worker alive."""
_MEMORY_ERRORS = {"MemoryError", "OutOfMemoryError"}
_MEMORY_TEXTS = ("out of memory", "can't allocate memory")
_STANDARD_ERROR = 2

Farewell = Callable[[LastWords], None]

logger = logging.getLogger(__name__)


class WatchedTeacher:
    """A teacher whose calls are counted. Takes and gives what `protocol.Teacher` says.

    An exception of the teacher without a name of ours leaves an engine in no known state: it is the worker's end, as a
    crash of the engine would be, and `end` is called with what was raised.
    """

    def __init__(self, teacher: Teacher, *, end: Farewell):
        self._teacher, self._end = teacher, end
        self._counting = threading.Lock()
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
        """Whether a call is under way."""
        return self._begun > self._ended

    @property
    def signs_of_life(self) -> tuple[int, int, int]:
        """Other than a while ago as long as anything goes on."""
        return self._teacher.progress, self._begun, self._ended

    def score(self, sequences: Sequence[TokenSequence]) -> list[ScoredSequence]:
        """See `protocol.Teacher`."""
        with self._counted():
            return self._teacher.score(sequences)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._begun += 1
        try:
            yield
        except ColdstillError:
            raise
        except Exception as error:
            logger.exception("the teacher raised what has no name")
            self._end(_words_of(error))
            raise
        finally:
            with self._counting:
                self._ended += 1


class Watchdog(threading.Thread):
    """Looks at a teacher until the process ends; calls `end` once, when no call can be expected to return."""

    def __init__(self, teacher: WatchedTeacher, *, hung_after_s: float, end: Farewell):
        super().__init__(name="watchdog", daemon=True)
        self._teacher, self._hung_after_s, self._end = teacher, hung_after_s, end
        self._processes: dict[int, psutil.Process] = {}
        self._look_s = min(_LONGEST_LOOK_S, hung_after_s / 4)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Look no longer."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Look, again and again."""
        try:
            self._look()
        finally:  # a timer that is left would end this process long after
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        quiet_s, last = 0.0, self._teacher.signs_of_life
        while not self._stopped.wait(self._look_s):
            signs = self._teacher.signs_of_life
            quiet_s = quiet_s + self._look_s if self._teacher.is_busy and signs == last else 0.0
            last = signs
            self._arm_the_last_resort()
            words = self._gone()
            if words is None and quiet_s >= self._hung_after_s:
                words = LastWords(cause="the engine hung", reason=f"hung: no progress for {quiet_s:.0f} s")
            if words:
                faulthandler.dump_traceback(file=_STANDARD_ERROR)
                self._end(words)
                return

    def _arm_the_last_resort(self) -> None:
        """A call that hangs with the interpreter's lock stops this thread too; one in C then ends the process."""
        if self._teacher.is_busy:
            faulthandler.dump_traceback_later(2 * self._hung_after_s, exit=True, file=_STANDARD_ERROR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _gone(self) -> LastWords | None:
        for pid in self._teacher.processes:
            try:
                process = self._processes.setdefault(pid, psutil.Process(pid))
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            except psutil.NoSuchProcess:
                pass
            return LastWords(cause="a process of the engine died", reason=f"process {pid} of the engine is gone")
        return None


def end_process(words: LastWords, *, teacher: Teacher | None, speak: Callable[[LastWords], None]) -> NoReturn:
    """Say why, end the engine's processes and this one, at once and without any clean-up that could hang."""
    logger.error("this worker ends itself: %s", words.reason)
    speaker = threading.Thread(target=speak, args=(words,), daemon=True)
    speaker.start()
    speaker.join(_SPEAKING_S)
    for pid in teacher.processes if teacher else ():
        with suppress(psutil.Error):
            psutil.Process(pid).kill()
    os._exit(1)


def _words_of(error: Exception) -> LastWords:
    name, is_memory = type(error).__name__, is_memory_error(error)
    return LastWords(
        cause="out of memory" if is_memory else f"the engine raised {name}",
        reason=f"{name}: {error}",
        out_of_memory=is_memory,
    )


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that memory ran out. torch's class is known by its name:
    the engine may not have torch."""
    cause: BaseException | None = error
    while cause is not None:
        names = {cls.__name__ for cls in type(cause).__mro__}
        if names & _MEMORY_ERRORS or any(text in str(cause).lower() for text in _MEMORY_TEXTS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
