"""Does more data average the noise of draws out? The ways of drawing that matter, trained on 300,000 targets.

DEMO is the output folder of a finished `coldstill demo`. Models, captures, losses and figures are those of part 2 of
`benchmarks.draws`, whose runs have 54,000 targets. The rows are all pairs of the demo's distillation part, in one
random order per epoch; a second epoch gives what is missing. Only the teacher, the student, the tokenizer and the text
of DEMO are read. Each finished run is a line of OUTPUT/runs.jsonl; a second start trains the missing runs only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.command import add_folders, is_quick, new_parser
from benchmarks.common.report import finish
from benchmarks.common.run_log import claim
from benchmarks.draws.grid import LOG, Lines, key_of, runs_of, shares_of, train_missing
from benchmarks.draws.plan import DENSE, PLAIN, TEACHERS, Cache, Run, Side
from benchmarks.draws.tables import print_shares
from coldstill.common.files import new_folder
from coldstill.demo.text import write_text

TARGETS, QUICK_TARGETS = 300_000, 2_000
QUICK_ROWS = 64
SEEDS = 3
DEFAULT = Side("K=8, D=64, systematic, kept 64", Cache(8, 64, 64, "systematic"))
SIDES = [
    PLAIN,
    DENSE,
    DEFAULT,
    Side("K=16, D=64, iid, kept 32", Cache(16, 64, 32, "iid")),
    Side("K=4, D=64, systematic, kept 64", Cache(4, 64, 64, "systematic")),
    Side("K=8, D=64, systematic+lp, kept 64", Cache(8, 64, 64, "systematic", logprobs=True)),
]
"""Named as in `plan.py`, in the order of what is most wanted."""
QUICK_SIDES = SIDES[:3]


def planned(*, quick: bool) -> Iterator[Run]:
    """Every run. The flat teacher comes first: it is the one with noise to average out."""
    seeds, teachers = (1, list(TEACHERS)[:1]) if quick else (SEEDS, list(TEACHERS))
    for teacher in teachers:
        for seed in range(seeds):
            for side in QUICK_SIDES if quick else SIDES:
                yield Run(teacher, seed, side)


def all_pairs(output: Path, *, limit: int | None) -> Path:
    """The file with all pairs of the distillation part, or the first `limit`, which is written if it is missing."""
    folder = output / "text"
    if not folder.exists():
        with new_folder(folder) as beside:
            write_text(beside, distill_rows=limit)
    return folder / "distill.pairs.jsonl"


def report(runs: Lines, *, quick: bool) -> dict[str, Any]:
    """What is stored of the log: shares of the runs whose teacher and seed have both ends, all runs, and the plan."""
    wanted = {run.key for run in planned(quick=quick)}
    return {
        "runs_done": len(wanted & set(map(key_of, runs))),
        "runs_planned": len(wanted),
        "share_of_dense_gain": shares_of(runs),
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the shares, and store a full run."""
    parser = new_parser(
        "draws.long",
        __doc__,
        make="bench-draws-long DEMO=DIR OUTPUT=DIR",
        takes="36 runs of 3.5 minutes each on one core",
        quick="one teacher, three sides, few targets",
        result="draws_300k",
    )
    add_folders(parser, demo=True, report=True)
    options, quick = parser.parse_args(arguments), is_quick()
    claim(options.output, benchmark="draws.long", demo=str(options.demo.resolve()), quick=quick)
    if not options.report:
        rows, targets = (
            all_pairs(options.output, limit=QUICK_ROWS if quick else None),
            QUICK_TARGETS if quick else TARGETS,
        )
        runs = planned(quick=quick)
        train_missing(runs, demo=options.demo, output=options.output, quick=quick, rows=rows, targets=targets)
    lines = runs_of(options.output / LOG)
    print_shares(lines)
    finish("draws_300k", report(lines, quick=quick), command="make bench-draws-long DEMO=DIR", quick=quick)


if __name__ == "__main__":
    main()
