"""Quality of students trained from caches of several K and numbers of draws, compared with dense TAID.

DEMO is the output folder of a finished `coldstill demo`. There are two teachers: the demo's, which is flat, and the
same model with its logits divided by .512, which is as sharp as a large one. There are three seeds for the order of the
rows. Every side trains the same student on the same rows and steps:

* plain fine-tuning;
* forward KL and TAID with the teacher in memory;
* TAID from a cache of K = 8, 16, 32 ids and D = 0, 32, 64 independent draws, of which a position keeps at most 32;
* TAID from K = 16 and 256 draws, all kept, which shows how much of a gap is noise of the draws;
* TAID from K = 16 with the top K renormalized, as in other tools.

Caches are real captures, read from their shards, so the figures include the loss of storage. Losses are the trainer's.

Prints held-out KL(teacher || student) over the whole vocabulary, and each side's share of dense TAID's gain over plain
fine-tuning. Each finished run is written to OUTPUT/runs.jsonl; a second start trains the missing runs only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.common.command import add_folders, is_quick, new_parser
from benchmarks.common.report import finish
from benchmarks.common.run_log import claim
from benchmarks.draws.grid import LOG, key_of, kls_of, runs_of, shares_of, train_missing
from benchmarks.draws.plan import DENSE, DENSE_KL, PLAIN, TEACHERS, Cache, Run, Side
from benchmarks.draws.tables import print_shares

CACHED = [Side(f"K={k}, D={d}", Cache(k, d)) for k in (8, 16, 32) for d in (0, 32, 64)]
MORE_DRAWS = Side("K=16, D=256, all kept", Cache(16, 256, kept_draws=256))
RENORMALIZED = Side("K=16, renormalised", Cache(16, 0), renormalize=True)
SIDES = [PLAIN, DENSE_KL, DENSE, *CACHED, MORE_DRAWS, RENORMALIZED]
QUICK_SIDES = [PLAIN, DENSE, Side("K=16, D=0", Cache(16, 0)), Side("K=16, D=64", Cache(16, 64))]
SEEDS = 3


def planned(*, quick: bool) -> list[Run]:
    """Every run; the sides of one seed and teacher take turns."""
    teachers, sides, seeds = (["as trained"], QUICK_SIDES, 1) if quick else (list(TEACHERS), SIDES, SEEDS)
    return [Run(teacher, seed, side) for seed in range(seeds) for teacher in teachers for side in sides]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the missing runs, print the table, and store a full run."""
    parser = new_parser(
        "draws.quality",
        __doc__,
        make="bench-quality DEMO=DIR OUTPUT=DIR",
        takes="about 2.5 hours on one core",
        quick="one teacher, one seed, a fifth of the rows, four sides",
        result="quality",
    )
    add_folders(parser, demo=True)
    options, quick = parser.parse_args(arguments), is_quick()
    claim(options.output, benchmark="draws.quality", demo=str(options.demo.resolve()), quick=quick)
    runs = planned(quick=quick)
    train_missing(runs, demo=options.demo, output=options.output, quick=quick)
    wanted = {run.key for run in runs}
    lines = [line for line in runs_of(options.output / LOG) if key_of(line) in wanted]
    print_shares(lines)
    figures = {
        "share_of_dense_gain": {
            teacher: {side: round(statistics.mean(values), 4) for side, values in of_sides.items()}
            for teacher, of_sides in shares_of(lines, digits=9).items()
        },
        "kl": {
            teacher: {side: [round(kl, 5) for kl in of_seed.values()] for side, of_seed in of_sides.items()}
            for teacher, of_sides in kls_of(lines).items()
        },
        "log": lines,
    }
    finish("quality", figures, command="make bench-quality DEMO=DIR", quick=quick)


if __name__ == "__main__":
    main()
