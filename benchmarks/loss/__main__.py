"""Time and peak memory of a loss, from hidden states to the gradients of hidden states and head.

[M, D] = [2048, 512], V = 32,000 and 151,936, K = 16, with 4 and 16 draws on average. Each case has its own process;
cases take turns in every round, on fresh inputs. The three matrix products alone are the floor. With one thread,
seconds are CPU time, otherwise wall time. Peak memory is counted above the level before the call. Inputs, the dense
side's teacher logits among them, are therefore not counted; the gradients are. On a CPU it is the peak of the resident
set.

Ratios are medians of the rounds' own ratios, the largest over V and draws. If their quartiles enclose the goal, there
is no verdict. A quick run has none either, because with few positions the head's gradient dominates. The run fails if
two sides that compute the same loss differ.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from tqdm import tqdm

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish, load_average, wide_console
from benchmarks.common.spread import Spread, ratio, verdict

POSITIONS, QUICK_POSITIONS, WIDTH = 2048, 256, 512
VOCABULARIES = (32_000, 151_936)
LARGE = max(VOCABULARIES)
DRAWS = (4, 16)
READS_DRAWS = ("naive sparse TAID", "fused sparse TAID")
SIDES = ("products alone", "naive cross-entropy", "fused cross-entropy", "dense TAID", *READS_DRAWS)

MOST = {
    "taid_over_cross_entropy_time": 1.10,
    "taid_over_cross_entropy_memory": 1.10,
    "taid_over_naive_cross_entropy_time": 0.75,
    "taid_over_naive_cross_entropy_memory": 0.25,
}
"""Goals: upper limits of the ratios."""

SAME = (("naive cross-entropy", "fused cross-entropy"), ("naive sparse TAID", "fused sparse TAID"))
LARGEST_DIFFERENCE = 1e-3
"""Relative difference allowed between a naive and a fused side. On a GPU the naive side's logits are bfloat16."""


@dataclass(frozen=True)
class Case:
    """A side, a vocabulary, and a mean number of draws."""

    side: str
    vocabulary: int
    draws: int

    @property
    def name(self) -> str:
        return f"{self.side}, {self.draws} draws" if self.side in READS_DRAWS else self.side


Found = dict[Case, list[dict[str, float]]]


class Process:
    """The child process of a side, which measures on request."""

    def __init__(self, side: str, draws: int):
        self.side, self.draws = side, draws
        command = [sys.executable, "-m", "benchmarks.loss.case", side]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> dict[str, Any]:
        """Wait for the start. Returns the number of `threads` and the `clock` of the process."""
        return self._answer()

    def measure(self, **shape: int) -> dict[str, float]:
        """Measure once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**shape, "draws": self.draws}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmark failed: {self.side} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run(*, positions: int, rounds: int) -> tuple[Found, dict[str, Any]]:
    """Measure each case once per round. Also returns how the measurements were taken."""
    found: Found = {}
    processes = [Process(side, DRAWS[0]) for side in SIDES]
    processes += [Process(side, draws) for draws in DRAWS[1:] for side in READS_DRAWS]
    how, *_ = [process.ready() for process in processes]
    with tqdm(total=len(VOCABULARIES) * rounds * len(processes), desc="loss", unit="run") as bar:
        for vocabulary in VOCABULARIES:
            for seed in range(rounds):
                for process in processes:
                    case = Case(process.side, vocabulary, process.draws)
                    bar.set_postfix_str(f"V {vocabulary:,}, {case.name}")
                    shape = {"positions": positions, "width": WIDTH, "vocabulary": vocabulary, "seed": seed}
                    found.setdefault(case, []).append(process.measure(**shape))
                    bar.update()
    for process in processes:
        process.close()
    return found, {**how, "positions": positions, "width": WIDTH}


def ratio_of(found: Found, over: Case, under: Case, what: str) -> Spread:
    """Of the rounds' ratios of two cases."""
    return ratio((each[what] for each in found[over]), (each[what] for each in found[under]))


def worst(found: Found, over: str, under: str, what: str, *, vocabularies: Sequence[int]) -> Spread:
    """The largest ratio over vocabularies and numbers of draws."""
    return max(
        ratio_of(found, case, Case(under, case.vocabulary, DRAWS[0]), what)
        for case in found
        if case.side == over and case.vocabulary in vocabularies
    )


def check_same(found: Found) -> None:
    """Raises `SystemExit` if a naive and a fused side differ."""
    for naive, fused in SAME:
        for case in [case for case in found if case.side == fused]:
            for one, other in zip(found[Case(naive, case.vocabulary, case.draws)], found[case], strict=True):
                for what in ("loss", "by_hidden", "by_weight"):
                    if not abs(one[what] - other[what]) <= LARGEST_DIFFERENCE * abs(one[what]):
                        raise SystemExit(f"benchmark failed: {what} of {case} is {other[what]}, not {one[what]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store a full run."""
    parser = new_parser(
        "loss",
        __doc__,
        make="bench-loss",
        takes="about 20 minutes on one core",
        quick="fewer positions and rounds, under three minutes",
        result="loss",
    )
    parser.parse_args(arguments)
    quick = is_quick()
    found, how = run(positions=QUICK_POSITIONS if quick else POSITIONS, rounds=3 if quick else 5)
    check_same(found)
    figures = _figures(found, how, goals={} if quick else MOST)
    _print(found, figures)
    finish("loss", figures, command="make bench-loss", quick=quick)


def _figures(found: Found, how: dict[str, Any], *, goals: dict[str, float]) -> dict[str, Any]:
    ours, everywhere, large = "fused sparse TAID", VOCABULARIES, [LARGE]
    ratios = {
        "taid_over_cross_entropy_time": worst(found, ours, "fused cross-entropy", "seconds", vocabularies=everywhere),
        "taid_over_cross_entropy_memory": worst(
            found, ours, "fused cross-entropy", "peak_bytes", vocabularies=everywhere
        ),
        "taid_over_naive_cross_entropy_time": worst(found, ours, "naive cross-entropy", "seconds", vocabularies=large),
        "taid_over_naive_cross_entropy_memory": worst(
            found, ours, "naive cross-entropy", "peak_bytes", vocabularies=large
        ),
        "products_over_naive_cross_entropy_time": worst(
            found, "products alone", "naive cross-entropy", "seconds", vocabularies=large
        ),
    }
    return {
        **{name: round(middle, 3) for name, (middle, _, _) in ratios.items()},
        "quartiles": {name: [round(low, 3), round(high, 3)] for name, (_, low, high) in ratios.items()},
        "verdicts": {name: verdict(ratios[name], most, is_limit=True) for name, most in goals.items()},
        **how,
        "load_average": load_average(),
        "cases": {
            f"V {case.vocabulary}, {case.name}": {
                "seconds": [round(each["seconds"], 4) for each in rounds],
                "wall_seconds": [round(each["wall_seconds"], 4) for each in rounds],
                "peak_mb": [round(each["peak_bytes"] / 1e6, 1) for each in rounds],
            }
            for case, rounds in found.items()
        },
    }


def _print(found: Found, figures: dict[str, Any]) -> None:
    console = wide_console(120)
    for vocabulary in VOCABULARIES:
        title = f"M = {figures['positions']:,}, V = {vocabulary:,}, {figures['threads']} thread(s)"
        table = Table("side", "seconds", "min to max", "vs. naive CE", "peak MB", "vs. naive CE", title=title)
        naive = Case("naive cross-entropy", vocabulary, DRAWS[0])
        for case in [case for case in found if case.vocabulary == vocabulary]:
            seconds = [each["seconds"] for each in found[case]]
            table.add_row(
                case.name,
                f"{statistics.median(seconds):.3f}",
                f"{min(seconds):.3f} to {max(seconds):.3f}",
                f"{ratio_of(found, case, naive, 'seconds').middle:.3f}",
                f"{statistics.median(each['peak_bytes'] for each in found[case]) / 1e6:,.0f}",
                f"{ratio_of(found, case, naive, 'peak_bytes').middle:.3f}",
            )
        console.print(table)
    for name, quartiles in figures["quartiles"].items():
        shown = figures["verdicts"].get(name, f"quartiles {quartiles[0]:.3f} to {quartiles[1]:.3f}")
        console.print(f"{name}: {figures[name]:.3f}, {shown}")


if __name__ == "__main__":
    main()
