"""Seconds from a new virtual environment to a student trained on `examples/tiny`, by stage.

The wheel is built first, which is not counted. The packages come from uv's cache or, if it lacks them, from the index.
The working folder holds the examples only, so that what runs is the installed wheel. Training uses one thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish

REPOSITORY = Path(__file__).parent.parent
LIMIT_S = 180.0
"""What a user who follows the quick start may wait, on 2 cores."""


def run(command: Sequence[str | Path], *, cwd: Path) -> float:
    """Run a command without this clone on its path; return its seconds. Raises `SystemExit` if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{command} failed with exit code {done.returncode}")
    return time.monotonic() - began


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the tracked files, because setuptools writes beside pyproject.toml."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True).stdout
    source = folder / "source"
    for name in listed.decode().split("\0"):
        if name and not name.startswith(("examples/", "tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name, follow_symlinks=False)
    uv: list[str | Path] = [sys.executable, REPOSITORY / "requirements/uv.py", "cpu"]
    run([*uv, "build", "--wheel", "--no-build-isolation", "--out-dir", folder, source], cwd=folder)
    (wheel,) = folder.glob("coldstill-*.whl")
    return wheel


def measure(folder: Path) -> dict[str, float]:
    """Seconds of each stage."""
    wheel = build_wheel(folder)
    work, environment = folder / "work", folder / "environment"
    for name in ("tiny", "tiny_student"):
        shutil.copytree(REPOSITORY / "examples" / name, work / "examples" / name)
    shutil.copy2(REPOSITORY / "examples" / "tiny_train.yaml", work / "examples")
    uv: list[str | Path] = [sys.executable, REPOSITORY / "requirements/uv.py", "cpu"]
    lock = REPOSITORY / "requirements/cpu.txt"
    install: list[str | Path] = ["pip", "install", "--python", environment, "--constraint", lock, f"{wheel}[train]"]
    coldstill = environment / "bin" / "coldstill"
    return {
        "environment": run([*uv, "venv", "--python", sys.executable, environment], cwd=folder),
        "install": run([*uv, *install], cwd=folder),
        "verify": run([coldstill, "verify", "--deep", "examples/tiny"], cwd=work),
        "train": run([coldstill, "train", "examples/tiny_train.yaml"], cwd=work),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in a temporary folder. Raises `SystemExit` if a stage fails or all together take more than `LIMIT_S`."""
    parser = new_parser(
        "first_result",
        __doc__,
        make="bench-first-result",
        takes="half a minute with uv's cache; more than three minutes fail",
        quick="the same stages",
        result="first_result",
    )
    parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        stages = measure(Path(folder))
    total = sum(stages.values())
    figures: dict[str, Any] = {"stages_s": {name: round(seconds, 1) for name, seconds in stages.items()}}
    figures |= {"total_s": round(total, 1), "load": round(os.getloadavg()[0], 1)}
    finish("first_result", figures, command="python -m benchmarks.first_result", quick=is_quick())
    if total > LIMIT_S:
        raise SystemExit(f"a student took {total:.0f} s; at most {LIMIT_S:.0f} s are wanted")


if __name__ == "__main__":
    main()
