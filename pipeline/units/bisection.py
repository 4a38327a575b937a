"""What to do next with a unit over which workers die. Its trials in, the next task out; no state but the trials.

1. The unit as it was planned, alone on its worker, until it has cost `max_attempts` workers.
2. The search: parts of its rows are scored and thrown away. A part that lives is acquitted; a part that dies is halved;
   a single row is guilty once it has died alone `max_attempts` times. One death is no proof: a spot machine may have
   been taken away. For a part one death is enough, because halving it accuses nobody.
3. The rest: the unit without the guilty rows. Where nobody was guilty the deaths may have had nothing to do with the
   unit, and it is done as planned: an unlucky unit has the same bytes as a lucky one.
4. In parts: where only the rows together are deadly (memory), those parts that the search acquitted, one after the
   other. Values may differ from those of the whole by the engine's tolerance.
5. The unit is given up.

Running out of memory, where the engine says so, is no accident: it goes from 1 to 2 at once, and past 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .attempts import Attempts, ExcludedRow, Kind, Trial

MOST_DEATHS = 100
"""Workers that one unit may cost. Eight deadly rows among 1,024 are found with fewer."""


@dataclass(frozen=True, kw_only=True)
class UnitTask:
    """What a worker is to do with a unit: commit it, without `excluded` rows and in `parts` where there are any, or
    score source rows `start` to `stop` and throw the result away (kind `probe`)."""

    unit: int
    kind: Kind
    start: int
    stop: int
    excluded: tuple[ExcludedRow, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Findings:
    """What the probes of a unit say so far: `guilty` rows, `acquitted` parts, and the part to try `next`, if any."""

    guilty: tuple[ExcludedRow, ...]
    acquitted: tuple[tuple[int, int], ...]
    next: tuple[int, int] | None


def next_task(attempts: Attempts, *, first_row: int, rows: int, max_attempts: int) -> UnitTask | None:
    """The next task of a unit of `rows` source rows from `first_row` on; None: give it up."""
    trials, stop = attempts.trials, first_row + rows

    def task(kind: Kind, **more: object) -> UnitTask:
        return UnitTask(unit=attempts.unit, kind=kind, **{"start": first_row, "stop": stop, **more})  # type: ignore[arg-type]

    if sum(trial.died_of is not None for trial in trials) >= MOST_DEATHS:
        return None
    if not _is_spent(trials, "whole", max_attempts):
        return task("whole")
    found = search(trials, start=first_row, stop=stop, max_attempts=max_attempts)
    if found.next:
        return task("probe", start=found.next[0], stop=found.next[1])
    is_too_large = not found.guilty and any(_ran_out_of_memory(trial) for trial in trials if trial.kind == "whole")
    if not is_too_large and not _is_spent(trials, "rest", max_attempts):
        return task("rest", excluded=found.guilty)
    if len(found.acquitted) > 1 and not _is_spent(trials, "parts", max_attempts):
        return task("parts", excluded=found.guilty, parts=found.acquitted)
    return None


def search(trials: Iterable[Trial], *, start: int, stop: int, max_attempts: int) -> Findings:
    """What the probes among `trials` say of source rows `start` to `stop`, which are deadly together."""
    probes: dict[tuple[int, int], list[Trial]] = {}
    for trial in trials:
        if trial.kind == "probe":
            probes.setdefault((trial.start, trial.stop), []).append(trial)
    guilty: list[ExcludedRow] = []
    acquitted: list[tuple[int, int]] = []
    left = _halves(start, stop)
    while left:
        part = left.pop()
        tried = probes.get(part, [])
        deaths = [trial.died_of for trial in tried if trial.died_of]
        if len(deaths) < len(tried):
            acquitted.append(part)
        elif part[1] - part[0] > 1 and deaths:
            left += _halves(*part)
        elif len(deaths) >= max_attempts:
            guilty.append(ExcludedRow(source_row=part[0], detail=deaths[-1].cause))
        else:
            return Findings(tuple(guilty), tuple(acquitted), part)
    return Findings(tuple(guilty), tuple(acquitted), None)


def _halves(start: int, stop: int) -> list[tuple[int, int]]:
    """The later one first: it waits on the stack."""
    middle = (start + stop) // 2
    return [(middle, stop), (start, middle)] if stop - start > 1 else [(start, stop)]


def _is_spent(trials: Iterable[Trial], kind: Kind, max_attempts: int) -> bool:
    deaths = [trial for trial in trials if trial.kind == kind and trial.alone and trial.died_of]
    return len(deaths) >= max_attempts or any(_ran_out_of_memory(trial) for trial in deaths)


def _ran_out_of_memory(trial: Trial) -> bool:
    return trial.alone and trial.died_of is not None and trial.died_of.out_of_memory
