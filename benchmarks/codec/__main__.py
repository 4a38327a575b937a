"""Bytes, speed and loss of the codec and of other codecs, on the same tokens in one run.

    python -m benchmarks.codec [--cache DIR]        the first run trains the teacher, about ten minutes
    python -m benchmarks.codec --grid-study         how the codec's grids and rank table were chosen
    QUICK=1 ...                                     a fifth of the rows, three rounds; nothing is stored

Our codec runs at several K, fine and coarse, with and without a floor and draws, from frames in memory and from a
shard. `rivals.py` has the others; `inputs/teacher_distributions.py` has the two teachers, flat and sharp. Speeds are
CPU time of one thread; sides take turns in every round. KL is that of the exact distribution over kept ids and tail to
the stored one. The run fails if a decoded set, mass or mean KL breaks the header's promise.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from benchmarks.codec.cases import run
from benchmarks.codec.tables import figures, headline, print_tables
from benchmarks.common.report import finish
from benchmarks.inputs import CACHE
from benchmarks.inputs.teacher_distributions import load_distributions
from coldstill.common.errors import ColdstillError

QUICK_EVERY = 5


def main() -> None:
    """Measure, print, and store a full run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the teacher for later runs")
    parser.add_argument("--grid-study", action="store_true", help="print the study of grids and rank tables instead")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    # CPU time is that of the whole process, so no side may use more than one thread.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    distributions = load_distributions(options.cache)
    console = Console(width=None if Console().is_terminal else 180)
    if options.grid_study:
        from benchmarks.codec.grid_study import study

        study(distributions, every=QUICK_EVERY if quick else 2, console=console)
        return
    try:
        lines = run(distributions, every=QUICK_EVERY if quick else 1, rounds=3 if quick else 7)
    except ColdstillError as error:
        raise SystemExit(f"benchmark failed: {error}") from None
    print_tables(lines, console)
    teachers = {
        name: {"temperature": round(found.temperature, 4), "mean_entropy": round(found.entropy, 3)}
        for name, found in distributions.items()
    }
    positions = lines[0].side.case.positions
    facts = {"teachers": teachers, "text_sha256": distributions["flat"].text, "positions": positions}
    document = {**headline(lines), **facts, "lines": [figures(line) for line in lines]}
    finish("codec", document, command="python -m benchmarks.codec", quick=quick)


if __name__ == "__main__":
    main()
