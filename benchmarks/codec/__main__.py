"""Bytes, speed and loss of the codec and of other codecs, on the same tokens in one run.

Our codec runs at several K, fine and coarse, with and without a floor and draws, from frames in memory and from a
shard. `rivals.py` has the others; `inputs/teacher_distributions.py` has the two teachers, flat and sharp. Speeds are
CPU time of one thread; sides take turns in every round. KL is that of the exact distribution over kept ids and tail to
the stored one. The run fails if a decoded set, mass or mean KL breaks the header's promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish, wide_console
from benchmarks.inputs import CACHE
from coldstill.common.errors import ColdstillError

QUICK_EVERY = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store a full run."""
    parser = new_parser(
        "codec",
        __doc__,
        make="bench-codec",
        takes="minutes; the first run trains the teacher, about ten minutes more",
        quick="a fifth of the rows, three rounds",
        result="codec",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the teacher for later runs")
    parser.add_argument("--grid-study", action="store_true", help="print how grids and rank table were chosen instead")
    options, quick = parser.parse_args(arguments), is_quick()
    import pyarrow as pa

    from benchmarks.codec.cases import run
    from benchmarks.codec.grid_study import study
    from benchmarks.codec.tables import figures, headline, print_tables
    from benchmarks.inputs.teacher_distributions import load_distributions

    # CPU time is that of the whole process, so no side may use more than one thread.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    distributions = load_distributions(options.cache)
    console = wide_console(180)
    if options.grid_study:
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
