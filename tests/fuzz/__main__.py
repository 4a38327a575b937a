"""`python -m tests.fuzz --count 10000 --seed 1`: a campaign, its outcomes as a table; exit code 1 if a law was
violated."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .campaign import Verdict, run

_OUTCOMES = ("as before", "lawful", "named", "FAULT")


def main(arguments: list[str]) -> int:
    """Run a campaign and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1, help="seed of the campaign")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    wanted = [(chosen.seed, number) for number in range(chosen.first, chosen.first + chosen.count)]
    verdicts = list(tqdm(run(wanted), total=len(wanted), desc="fuzz", unit=" mutants", mininterval=2))
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(_table(verdicts))
    console.print(_errors(verdicts))
    faults = [verdict for verdict in verdicts if verdict.outcome == "FAULT"]
    for fault in faults:
        console.print(f"\nseed {fault.seed} number {fault.number} ({fault.kind}):", style="bold red")
        console.print(fault.detail, markup=False, highlight=False)
    console.print(
        f"\n{len(verdicts)} mutants of seed {chosen.seed}, {time.monotonic() - began:.0f} s: "
        f"{len(faults)} unnamed outcomes"
    )
    return 1 if faults else 0


def _table(verdicts: list[Verdict]) -> Table:
    table = Table(title="Outcomes by kind of change")
    table.add_column("kind")
    for outcome in _OUTCOMES:
        table.add_column(outcome, justify="right")
    counts = Counter((verdict.resealed, verdict.kind, verdict.outcome) for verdict in verdicts)
    for resealed, name in ((False, "UNSEALED"), (True, "RESEALED")):
        table.add_section()
        table.add_row(name, style="bold")
        for kind in sorted({verdict.kind for verdict in verdicts if verdict.resealed == resealed}):
            table.add_row(kind, *(str(counts[resealed, kind, outcome]) for outcome in _OUTCOMES))
    table.add_section()
    table.add_row("all", *(str(sum(v.outcome == outcome for v in verdicts)) for outcome in _OUTCOMES), style="bold")
    return table


def _errors(verdicts: list[Verdict]) -> Table:
    table = Table(title="Named errors, the first of each mutant")
    table.add_column("error")
    table.add_column("mutants", justify="right")
    for name, count in Counter(v.detail for v in verdicts if v.outcome == "named").most_common():
        table.add_row(name, str(count))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
