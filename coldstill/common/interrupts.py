"""Ctrl-C, SIGTERM and SIGHUP as one exception, `Interrupted`, and the exit code that shells and schedulers expect.

Slurm, Kubernetes and spot machines announce the end of a process with SIGTERM, a closed terminal with SIGHUP. Python
itself ends at once on both, without a `finally`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)

received: list[int] = []
"""Signals of this process. Ray catches `Interrupted` in its own code and raises a plain `KeyboardInterrupt` instead,
and other threads than the main one get no exception at all."""

Handler = Callable[[int, Any], object]


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end. Code that handles Ctrl-C handles the others too.

    `resume`: a sentence that says what is kept and how to resume.
    """

    def __init__(self, signum: int = signal.SIGINT, resume: str = ""):
        self.signum, self.resume = signal.Signals(signum), resume
        name = "" if self.signum == signal.SIGINT else f" by {self.signum.name}"
        super().__init__(f"Interrupted{name}. {resume}".strip())

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum


def as_interrupted(error: KeyboardInterrupt, resume: str = "") -> Interrupted:
    """The signal that `error` stands for, with a sentence on how to resume unless it has one."""
    if isinstance(error, Interrupted):
        return Interrupted(error.signum, error.resume or resume)
    return Interrupted(received[-1] if received else signal.SIGINT, resume)


@contextmanager
def raising_interrupts(*, exit_at_second: bool = False) -> Iterator[None]:
    """Raise `Interrupted` in the main thread for each of `SIGNALS` while the block runs.

    Signals that are ignored, as after `nohup`, or that the program handles itself, stay so. `exit_at_second`: a second
    signal ends the process at once, also where the first one waits for something.
    """
    process, before = os.getpid(), len(received)

    def handle(signum: int, _: object) -> None:
        if os.getpid() != process:
            os._exit(128 + signum)  # a child that was forked inside the block
        received.append(signum)
        if exit_at_second and len(received) > before + 1:
            with suppress(Exception):
                sys.stderr.flush()
            os._exit(128 + signum)
        raise Interrupted(signum)

    with handling_signals(handle, only=_DEFAULTS):
        yield


@contextmanager
def handling_signals(handler: Handler, *, only: tuple[object, ...] | None = None) -> Iterator[None]:
    """Let `handler` handle `SIGNALS` while the block runs, except those that are ignored.

    `only`: current handlers that may be replaced. Outside of the main thread, which alone may set handlers, nothing
    changes.
    """
    replaced: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            current = signal.getsignal(signum)
            if current not in (None, signal.SIG_IGN) and (only is None or current in only):
                replaced[signum] = current
                signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, before in replaced.items():
            signal.signal(signum, before)


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Restore the handlers of `SIGNALS` after a block in which a library sets its own."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.getsignal(signum) for signum in SIGNALS} if is_main else {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if handler is not None:  # None: it was not set from Python
                signal.signal(signum, handler)


def end_with_parent() -> None:
    """For `preexec_fn` of `subprocess`: the kernel sends the child SIGTERM when its parent dies, on Linux only."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
