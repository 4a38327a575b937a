"""One stage in a process of its own: a command in, its end or `StageFailed` out.

A stage's memory is its own, so that the peak memory it reports is what it took. What it says on stderr (progress
bars) goes on to the terminal; what it prints goes to its log alone.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from coldstill.common.errors import ColdstillError

LAST_LINES = 20
"""How much of a failed command's output its error repeats."""


class StageFailed(ColdstillError):
    """A stage's command ended with an exit code other than 0."""


def run_stage(stage: str, command: Sequence[str], *, log: Path) -> None:
    """Run `command` to its end. `log` keeps both of its streams. Raises `StageFailed` with the last lines of them."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as kept:
        child = subprocess.Popen(
            command, stdout=kept, stderr=subprocess.PIPE, env=_environment(), preexec_fn=_end_with_parent
        )
        assert child.stderr is not None
        pump = threading.Thread(target=_pump, args=(child.stderr, kept.fileno()), daemon=True)
        pump.start()
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        # Not for ever: grandchildren that outlive the command for a moment hold the pipe open.
        pump.join(timeout=5)
    if code != 0:
        raise StageFailed(
            f"stage {stage}: {shlex.join(command)}",
            found=f"exit code {code}; its last lines:\n{_last_lines(log)}",
            wanted="exit code 0",
            fix=f"read {log}, mend the cause, and start the demo again: it goes on here",
        )


def _pump(stream: IO[bytes], log: int) -> None:
    """Hand on what comes, as it comes: a progress bar has no line ends to wait for."""
    while chunk := os.read(stream.fileno(), 65536):
        os.write(log, chunk)
        sys.stderr.buffer.write(chunk)
        sys.stderr.buffer.flush()


def _environment() -> dict[str, str]:
    size = shutil.get_terminal_size()
    return {
        # Threads that wait go to sleep soon. Where a neighbour takes one core of two, a training step of the teacher
        # takes 0.7 s so and several seconds else; on a quiet machine it costs a tenth.
        "GOMP_SPINCOUNT": "2000",
        **os.environ,
        # Behind a pipe a progress bar cannot ask the terminal how wide it is.
        "COLUMNS": str(size.columns),
        "LINES": str(size.lines),
    }


def _end_with_parent() -> None:
    """A demo that is killed takes its stage along: started again, it must not meet its own past."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def _last_lines(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])
