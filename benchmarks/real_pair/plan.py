"""Which runs the benchmark of a real pair needs, which are done, and which learning rate each side takes.

The order is that of value: every side once, then the other learning rates, then the other orders of rows, then the
other students, which take the first rate. A side's learning rate is the one with the lowest validation KL to the
teacher, chosen with the first order of rows; the test part has no say in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.run_log import lines_of
from benchmarks.real_pair.runs import Run, Side, Size, Student

Done = dict[Run, dict[str, Any]]


def read_log(log: Path) -> Done:
    """The records of the finished runs, by run."""
    return {run_of(record): record for record in lines_of(log)}


def run_of(record: dict[str, Any]) -> Run:
    """The run that a record is of."""
    return Run(record["layers"], record["healed"], record["side"], record["rate"], record["seed"], record["steps"])


def chosen_rate(side: Side, size: Size, done: Done) -> tuple[float, bool] | None:
    """The best learning rate of those tried with the main student, and whether all were; None if none was."""
    name, main = side.rate_of or side.name, size.students[0]
    tried = {rate: done.get(_run(main, name, rate, 0, size)) for rate in size.rates}
    kls = {rate: record["validation"]["kl"] for rate, record in tried.items() if record}
    if not kls:
        return None
    return min(kls, key=lambda rate: kls[rate]), len(kls) == len(tried)


def planned(sides: tuple[Side, ...], size: Size, done: Done) -> Iterator[tuple[Run, Side, bool]]:
    """Every run in order, its side, and whether its learning rate is final. One that is not has the first rate."""
    main, *others = size.students
    for rate in size.rates:
        for side in sides:
            if side.rate_of is None:
                yield _run(main, side.name, rate, 0, size), side, True
    for seed in range(size.seeds):
        for side in sides:
            rate, is_final = chosen_rate(side, size, done) or (size.rates[0], False)
            if seed > 0 or side.rate_of is not None:
                yield _run(main, side.name, rate, seed, size), side, is_final
    for student in others:
        for side in sides:
            yield _run(student, side.name, size.rates[0], 0, size), side, True


def reported(sides: tuple[Side, ...], size: Size, done: Done) -> dict[Student, dict[str, list[dict[str, Any]]]]:
    """Student -> side -> the finished runs with the side's learning rate, by seed. It is the best rate tried so far."""
    found: dict[Student, dict[str, list[dict[str, Any]]]] = {}
    for student in size.students:
        is_main = student == size.students[0]
        for side in sides:
            rate, _ = (chosen_rate(side, size, done) if is_main else None) or (size.rates[0], False)
            seeds = range(size.seeds if is_main else 1)
            records = [done.get(_run(student, side.name, rate, seed, size)) for seed in seeds]
            if kept := [record for record in records if record]:
                found.setdefault(student, {})[side.name] = kept
    return found


def _run(student: Student, side: str, rate: float, seed: int, size: Size) -> Run:
    return Run(student.layers, student.healed, side, rate, seed, size.steps)


def shares(of_sides: dict[str, list[dict[str, Any]]], *, floor: str, dense: str) -> dict[str, list[float]]:
    """Side -> its share of the gain of side `dense` over side `floor` in test KL, for each seed that all three have."""
    kls = {side: {record["seed"]: record["test"]["kl"] for record in records} for side, records in of_sides.items()}
    low, high = kls.get(dense, {}), kls.get(floor, {})
    return {
        side: [
            (high[seed] - kl) / (high[seed] - low[seed]) for seed, kl in of_seed.items() if seed in low and seed in high
        ]
        for side, of_seed in kls.items()
    }
