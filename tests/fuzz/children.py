"""A child process that reads many mutants, is watched by its parent, and is replaced when it dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CPU_SECONDS = 2.0
"""Processor time of one mutant, of all threads: wall time would depend on the load of the machine."""
WALL_SECONDS = 60.0
"""Wall time: a child that waits forever uses no processor time."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Child:
    """Reads folders in a process of its own; `sound` is a dataset to warm it up with."""

    def __init__(self, sound: Path):
        self._sound = sound
        self._process: subprocess.Popen[str] | None = None
        self.deaths = 0

    def read(self, root: Path, *, cpu_seconds: float = CPU_SECONDS) -> dict[str, Any]:
        """What came of a dataset: a `Reading` as a dictionary, or `{"died": how}`."""
        if self._process is None:
            self._start()
        answer = self._request(root, cpu_seconds=cpu_seconds)
        if "died" in answer:
            self.deaths += 1
            self.close()
        return answer

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            cwd=Path(__file__).parents[2],
        )
        answer = self._request(self._sound, cpu_seconds=60.0)
        if answer.get("unnamed") or answer.get("findings") != []:
            raise RuntimeError(f"a sound dataset is not read as one: {answer}")

    def _request(self, root: Path, *, cpu_seconds: float = CPU_SECONDS) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        began, cpu_before = time.monotonic(), self._cpu_seconds()
        try:
            self._process.stdin.write(f"{root}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"died": self._how()}
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            used, waited = self._cpu_seconds() - cpu_before, time.monotonic() - began
            if used > cpu_seconds or waited > max(WALL_SECONDS, cpu_seconds):
                self._process.send_signal(signal.SIGABRT)  # faulthandler writes where it is
                self._process.wait()
                return {"died": f"after {used:.1f} s of processor, {waited:.1f} s\n{self._stderr()}"}
        line = self._process.stdout.readline()
        if not line:
            return {"died": self._how()}
        answer: dict[str, Any] = json.loads(line)
        if answer["seconds"] > cpu_seconds:
            return {"died": f"after {answer['seconds']:.1f} s of processor"}
        return answer

    def _cpu_seconds(self) -> float:
        assert self._process is not None
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def _how(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{name}\n{self._stderr()}"

    def _stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-3000:]
