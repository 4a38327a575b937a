"""Run the debug configs of this folder one after another, each with the ordinary command.

    python -m examples.debug.run                # all, in the order that their `# after:` lines ask for
    python -m examples.debug.run train_js       # these, and those that must run before them

A config is `KIND_NAME.yaml`, where KIND is the command. The first line says what it shows and, as
`# after: capture_score`, which configs must run before it. Output goes to `debug/` below the working folder. A run
begins without the datasets and runs of the last one, and ends at the first config that fails.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import prepare

FOLDER = Path(__file__).parent
SLOW_S = 60.0
"""A config that takes longer on 2 cores shows too much; only a warning, because machines differ."""


def configs() -> dict[str, Path]:
    """Every config by its name, `KIND_NAME`."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def comes_after(path: Path) -> list[str]:
    """The names that the `# after:` of the first lines lists."""
    first = "\n".join(line for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
    found = re.search(r"# after: ([\w ,]+)", first)
    return re.findall(r"\w+", found[1]) if found else []


def in_order(names: Sequence[str]) -> list[str]:
    """`names` and all that must run before them, each once. Raises `ValueError` for an unknown name or a circle."""
    known, ordered = configs(), dict[str, None]()

    def add(name: str, waiting: tuple[str, ...]) -> None:
        if name not in known or name in waiting:
            problem = "comes after itself" if name in waiting else f"does not exist; there are {', '.join(known)}"
            raise ValueError(f"the debug config {name} {problem}")
        for earlier in comes_after(known[name]):
            add(earlier, (*waiting, name))
        ordered[name] = None

    for name in names:
        add(name, ())
    return list(ordered)


def run(name: str) -> float:
    """Run one config; return its seconds. Raises `SystemExit` with its output if it fails."""
    command = [sys.executable, "-m", "coldstill", name.partition("_")[0], str(configs()[name])]
    began = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        output = done.stdout.decode(errors="replace")
        raise SystemExit(f"{output}\n{name} failed with exit code {done.returncode}: {' '.join(command)}")
    return time.monotonic() - began


def main(arguments: Sequence[str]) -> None:
    """Run the configs that the command line names, all if there are none. Raises `SystemExit`, as `run` does."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.debug.run", description="Run debug configs, and those that must run before them."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(configs())}")
    names = parser.parse_args(arguments).names
    try:
        ordered = in_order(names or list(configs()))
    except ValueError as error:
        parser.error(str(error))
    prepare.prepare()
    for made in ("datasets", "runs"):
        shutil.rmtree(prepare.ROOT / made, ignore_errors=True)
    for name in ordered:
        seconds = run(name)
        warning = f"  WARNING: more than {SLOW_S:.0f} s" if seconds > SLOW_S else ""
        print(f"{seconds:6.1f} s  {name}{warning}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
