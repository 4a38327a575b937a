"""Progress bars: live on a terminal and in a notebook, now and then a line in a log."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm.std import tqdm as _Tqdm

_EVERY_S = 30.0
"""Seconds between two lines of a bar in a log: a run of a day writes about 3,000."""
_CONTROLS = re.compile(r"[\r\n]|\x1b\[A")


class LogLines:
    """A file for a bar whose output is no terminal: of what the bar draws, one line each 30 seconds, and the last one.

    A bar moves its cursor back and draws again, which a log would show as one line of thousands of drawings.
    """

    def __init__(self, file: TextIO, *, clock: Callable[[], float] = time.monotonic):
        """`clock`: seconds since any moment."""
        self._file, self._clock = file, clock
        self.encoding = getattr(file, "encoding", None)  # by it tqdm decides how to draw its bar
        self._drawn = self._written = ""
        self._next = clock() + _EVERY_S

    def write(self, text: str) -> None:
        """Keep what the bar draws, and write it if it is due. A bar that closes ends its line."""
        drawn = _CONTROLS.sub("", text).strip()
        self._drawn = drawn or self._drawn
        if text == "\n" or (drawn and self._clock() >= self._next):
            self._next = self._clock() + _EVERY_S
            if self._drawn != self._written:
                self._file.write(f"{self._drawn}\n")
                self._written = self._drawn

    def flush(self) -> None:
        """Flush the log."""
        self._file.flush()

    def isatty(self) -> bool:
        """Never a terminal: a bar with `disable=None` stays silent."""
        return False


def log_lines() -> LogLines | None:
    """The file of a bar if standard error shows no live bar; None if it is a terminal or belongs to a notebook."""
    error = sys.stderr
    if error is None or error.isatty() or type(error).__module__.startswith("ipykernel"):
        return None
    return LogLines(error)


class tqdm(_Tqdm):
    """tqdm's bar, which writes `log_lines` where no live bar is shown."""

    def __init__(self, *arguments: Any, **options: Any):
        lines = log_lines() if options.get("file") is None else None
        self._is_log = lines is not None
        super().__init__(*arguments, **{**options, "file": lines} if lines else options)

    def moveto(self, n: int) -> None:
        """Move the cursor to the line of this bar; a log has none."""
        if not self._is_log:
            super().moveto(n)
