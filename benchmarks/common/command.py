"""The command line of a benchmark: a help text that answers before torch is loaded, and the variables that it reads.

A module that is a command imports its heavy parts inside its functions.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_FOLDER = "benchmarks/results"


def new_parser(
    name: str,
    doc: str | None,
    *,
    takes: str,
    result: str | None,
    quick: str | None = None,
    make: str | None = None,
) -> argparse.ArgumentParser:
    """The parser of the module `name` of benchmarks, whose help is `doc`, the options and these facts.

    `takes`: how long a full run takes. `result`: name of the stored result; None if nothing is stored. `quick`: what
    QUICK=1 changes; None if the command does not read it. `make`: the target with its variables.
    """
    stored = f"; a full run stores {_FOLDER}/{result}_CORES_cores.json" if result else "; nothing is stored"
    facts = {
        "make": make and f"make {make}",
        "time": takes,
        "result": f"standard output{stored}",
        "QUICK=1": quick and f"in the environment: {quick}" + ("; nothing is stored" if result else ""),
    }
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{fact + ':':<10}{text}" for fact, text in facts.items() if text),
        allow_abbrev=False,
    )


def add_folders(
    parser: argparse.ArgumentParser, *, demo: bool = False, report: bool = False, dry_run: bool = False
) -> None:
    """Add OUTPUT, of a benchmark that resumes, behind DEMO, and the options that run nothing."""
    if demo:
        parser.add_argument("demo", metavar="DEMO", type=Path, help="output folder of a finished `coldstill demo`")
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="folder for models, captures and the log; a second start resumes"
    )
    if report:
        parser.add_argument("--report", action="store_true", help="report what is finished, and run nothing")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print the planned runs and their time, and exit")


def is_quick() -> bool:
    """Whether the environment has QUICK=1: a run of minutes, which stores nothing."""
    return os.environ.get("QUICK", "0") not in ("", "0")


def set_threads(default: int = 1) -> None:
    """Let torch use the number of threads that OMP_NUM_THREADS gives."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or default))
