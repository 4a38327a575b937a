"""Runs one stage of the demo as a child process, with its output in a log file.

The peak memory that a stage reports is its own, because it has its own process. Stderr (progress bars) also goes to the
terminal; stdout goes to the log only.
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
"""Lines of a failed command's output that its error quotes."""


class StageFailed(ColdstillError):
    """A stage's command ended with an exit code other than 0."""


def run_stage(stage: str, command: Sequence[str], *, log: Path) -> None:
    """Run `command` to its end and write both of its streams to `log`.

    Raises `StageFailed` with the last lines of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as log_file:
        child = subprocess.Popen(
            command, stdout=log_file, stderr=subprocess.PIPE, env=_environment(), preexec_fn=_end_with_parent
        )
        assert child.stderr is not None
        copier = threading.Thread(target=_copy_stderr, args=(child.stderr, log_file.fileno()), daemon=True)
        copier.start()
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        # A time limit, because grandchildren may outlive the command and keep the pipe open.
        copier.join(timeout=5)
    if code != 0:
        raise StageFailed(
            f"stage {stage}: {shlex.join(command)}",
            found=f"exit code {code}; its last lines:\n{_last_lines(log)}",
            wanted="exit code 0",
            fix=f"read {log}, fix the cause, then run the demo again: it resumes with this stage",
        )


def _copy_stderr(stream: IO[bytes], log: int) -> None:
    """Copy stderr to the log and the terminal without waiting for line ends: a progress bar has none."""
    while chunk := os.read(stream.fileno(), 65536):
        os.write(log, chunk)
        sys.stderr.buffer.write(chunk)
        sys.stderr.buffer.flush()


def _environment() -> dict[str, str]:
    size = shutil.get_terminal_size()
    return {
        # Makes idle OpenMP threads sleep early. When another process uses one of two cores, a training step of the
        # teacher then takes 0.7 s instead of several seconds; on an idle machine it costs a tenth.
        "GOMP_SPINCOUNT": "2000",
        **os.environ,
        # A progress bar behind a pipe cannot read the terminal's width.
        "COLUMNS": str(size.columns),
        "LINES": str(size.lines),
    }


def _end_with_parent() -> None:
    """End the stage when the demo is killed, so that a second start finds no earlier stage still running."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def _last_lines(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])
