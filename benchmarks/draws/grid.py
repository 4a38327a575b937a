"""Training runs over teachers, orders of rows and sides: trains those that the log lacks, and finds each side's share.

The log is OUTPUT/runs.jsonl; a line with a `side` is a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tqdm import tqdm

from benchmarks.common.run_log import append, lines_of
from benchmarks.common.shares import shares_of_gain

if TYPE_CHECKING:
    pass

TEACHERS = {"as trained": 1.0, "sharpened": 0.512}
"""Divisor of the teacher's logits."""
LOG = "runs.jsonl"
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Cache:
    """The part of the teacher that a cache keeps: `top_k` ids, and those of `draws` draws that fall into the tail.

    At most `kept_draws` of them are kept; None is the capture's default. `method`: how the draws are made. `logprobs`:
    with their log-probs, by which the loss takes off a part of their noise.
    """

    top_k: int
    draws: int
    kept_draws: int | None = 32
    method: Literal["iid", "systematic"] = "iid"
    logprobs: bool = False

    @property
    def tail(self) -> Literal["auto", "control_variate"]:
        """The loss's treatment of the tail."""
        return "control_variate" if self.logprobs else "auto"


@dataclass(frozen=True)
class Side:
    """One line of the table. A side without `cache` takes its targets from the labels or the dense teacher."""

    name: str
    cache: Cache | None = None
    renormalize: bool = False


PLAIN, DENSE_KL, DENSE = Side("plain fine-tuning"), Side("dense forward KL"), Side("dense TAID")


class Run(NamedTuple):
    """One training run: its teacher, order of rows and side."""

    teacher: str
    seed: int
    side: Side

    @property
    def key(self) -> tuple[str, int, str]:
        """As `key_of` its line in the log."""
        return self.teacher, self.seed, self.side.name


def key_of(line: dict[str, Any]) -> tuple[str, int, str]:
    """Teacher, seed and side of a line of the log."""
    return line["teacher"], line["seed"], line["side"]


def runs_of(log: Path) -> Lines:
    """The lines of the log that are runs."""
    return [line for line in lines_of(log) if "side" in line]


def missing(runs: Iterable[Run], log: Path) -> Iterator[Run]:
    """Yield the runs that the log does not have, in order."""
    done = {key_of(line) for line in runs_of(log)}
    return (run for run in runs if run.key not in done)


def train_missing(
    runs: Iterable[Run],
    *,
    demo: Path,
    output: Path,
    quick: bool,
    rows: Path | None = None,
    targets: int | None = None,
) -> None:
    """Train the missing runs, in order, on the models of `demo`, and append each to the log of `output`."""
    from benchmarks.draws.students import Bench

    log, benches = output / LOG, dict[str, Bench]()
    for run in tqdm(list(missing(runs, log)), desc="runs"):
        if run.teacher not in benches:
            folder = output / run.teacher.replace(" ", "_")
            benches[run.teacher] = Bench(
                demo, folder, divisor=TEACHERS[run.teacher], quick=quick, rows=rows, targets=targets
            )
        figures = benches[run.teacher].run(run.side, seed=run.seed)
        append(log, {"teacher": run.teacher, "seed": run.seed, "side": run.side.name, **figures})


def kls_of(runs: Lines) -> dict[str, dict[str, dict[int, float]]]:
    """Teacher -> side -> seed -> held-out KL, with seeds in order."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found.setdefault(run["teacher"], {}).setdefault(run["side"], {})[run["seed"]] = run["kl"]
    return found


def shares_of(runs: Lines, *, digits: int = 4) -> dict[str, dict[str, list[float]]]:
    """Teacher -> side -> share of dense TAID's gain over plain fine-tuning, for each seed that has all three."""
    found = {}
    for teacher, kls in kls_of(runs).items():
        of_sides = shares_of_gain(kls, floor=PLAIN.name, dense=DENSE.name)
        if known := {side: [round(share, digits) for share in shares] for side, shares in of_sides.items() if shares}:
            found[teacher] = known
    return found
