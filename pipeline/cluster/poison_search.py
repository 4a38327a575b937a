"""Finds poison rows by bisection: computes the next task of a unit from its trials.

The trials (`attempts.py`) are the only state.

1. The unit as planned, isolated on its worker, until it has killed `max_attempts` workers.
2. The search: parts of its rows are scored and discarded. A part whose worker survives has passed; a part whose worker
   dies is halved; a single row is poison once it has killed `max_attempts` workers in isolation. One death is no proof:
   a spot machine may have been taken away. One death is enough to halve a part, because that excludes no row.
3. The rest: the unit without its poison rows. If the search found none, the deaths may have been accidents, and the
   unit is run as planned: its bytes are those of a unit without accidents.
4. In parts: if the rows kill workers only together (memory), the parts that passed are scored one after the other.
   Values may differ from those of the whole unit by the engine's tolerance.
5. The unit is given up.

When the engine reports that memory ran out, no accident is assumed: the unit moves from 1 to 2 at once and skips 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coldstill.pipeline.worker import ExcludedRow, TaskKind, UnitTask

from .attempts import Attempts, Trial

MAX_DEATHS = 100
"""Maximum number of workers that one unit may kill. The search finds eight poison rows among 1,024 with fewer."""


@dataclass(frozen=True)
class Findings:
    """The results of a unit's probes so far: `poison` rows, parts that `passed`, and the part to probe `next`."""

    poison: tuple[ExcludedRow, ...]
    passed: tuple[tuple[int, int], ...]
    next: tuple[int, int] | None


def next_task(attempts: Attempts, *, first_row: int, rows: int, max_attempts: int) -> UnitTask | None:
    """The next task of a unit of `rows` source rows that starts at `first_row`; None: give it up."""
    trials, stop = attempts.trials, first_row + rows

    def task(kind: TaskKind, **more: object) -> UnitTask:
        return UnitTask(unit=attempts.unit, kind=kind, **{"start": first_row, "stop": stop, **more})  # type: ignore[arg-type]

    if sum(trial.died_of is not None for trial in trials) >= MAX_DEATHS:
        return None
    if not _is_spent(trials, "whole", max_attempts):
        return task("whole")
    found = search(trials, start=first_row, stop=stop, max_attempts=max_attempts)
    if found.next:
        return task("probe", start=found.next[0], stop=found.next[1])
    is_too_large = not found.poison and any(_ran_out_of_memory(trial) for trial in trials if trial.kind == "whole")
    if not is_too_large and not _is_spent(trials, "rest", max_attempts):
        return task("rest", excluded=found.poison)
    if len(found.passed) > 1 and not _is_spent(trials, "parts", max_attempts):
        return task("parts", excluded=found.poison, parts=found.passed)
    return None


def search(trials: Iterable[Trial], *, start: int, stop: int, max_attempts: int) -> Findings:
    """The results of the probes among `trials` for source rows `start` to `stop`, which kill workers together."""
    probes: dict[tuple[int, int], list[Trial]] = {}
    for trial in trials:
        if trial.kind == "probe":
            probes.setdefault((trial.start, trial.stop), []).append(trial)
    poison: list[ExcludedRow] = []
    passed: list[tuple[int, int]] = []
    left = _halves(start, stop)
    while left:
        part = left.pop()
        tried = probes.get(part, [])
        deaths = [trial.died_of for trial in tried if trial.died_of]
        if len(deaths) < len(tried):
            passed.append(part)
        elif part[1] - part[0] > 1 and deaths:
            left += _halves(*part)
        elif len(deaths) >= max_attempts:
            poison.append(ExcludedRow(source_row=part[0], detail=deaths[-1].cause))
        else:
            return Findings(tuple(poison), tuple(passed), part)
    return Findings(tuple(poison), tuple(passed), None)


def _halves(start: int, stop: int) -> list[tuple[int, int]]:
    """The later half first: it stays on the stack while the first half is searched."""
    middle = (start + stop) // 2
    return [(middle, stop), (start, middle)] if stop - start > 1 else [(start, stop)]


def _is_spent(trials: Iterable[Trial], kind: TaskKind, max_attempts: int) -> bool:
    deaths = [trial for trial in trials if trial.kind == kind and trial.isolated and trial.died_of]
    return len(deaths) >= max_attempts or any(_ran_out_of_memory(trial) for trial in deaths)


def _ran_out_of_memory(trial: Trial) -> bool:
    return trial.isolated and trial.died_of is not None and trial.died_of.out_of_memory
