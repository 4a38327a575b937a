"""Which runs the benchmark of a real pair needs, which are done, and which learning rate each side takes.

The order is that of value. First comes the main comparison: the main sides with each learning rate, then with the other
orders of rows. The other sides and students follow, with the first rate and one order. The learning rate of a main side
is the one with the lowest validation KL to the teacher, chosen with the first order; the test part has no say in it.
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


def is_measured(record: dict[str, Any]) -> bool:
    """Whether the run ended with a student; one whose gradient vanished did not."""
    return "stopped" not in record


def chosen_rate(side: Side, student: Student, size: Size, done: Done) -> tuple[float, bool]:
    """The learning rate of a side and whether it is final, which it is not while a rate of its choice is untried."""
    of_choice = side.rate_of or (side.name if side.is_main else None)
    if student != size.students[0] or of_choice is None:
        return size.rates[0], True
    tried = {rate: done.get(_run(student, of_choice, rate, 0, size)) for rate in size.rates}
    kls = {rate: record["validation"]["kl"] for rate, record in tried.items() if record and is_measured(record)}
    return min(kls, key=lambda rate: kls[rate], default=size.rates[0]), all(tried.values())


def planned(sides: tuple[Side, ...], size: Size, done: Done) -> Iterator[tuple[Run, Side, bool]]:
    """Every run in order, its side, and whether its learning rate is final."""
    main = [side for side in sides if side.is_main]
    for rate in size.rates:
        for side in main:
            yield _run(size.students[0], side.name, rate, 0, size), side, True
    later = [(size.students[0], side, seed) for seed in range(1, size.seeds) for side in main]
    later += [(size.students[0], side, 0) for side in sides if not side.is_main]
    later += [(student, side, 0) for student in size.students[1:] for side in sides]
    for student, side, seed in later:
        rate, is_final = chosen_rate(side, student, size, done)
        yield _run(student, side.name, rate, seed, size), side, is_final


def reported(sides: tuple[Side, ...], size: Size, done: Done) -> dict[Student, dict[str, list[dict[str, Any]]]]:
    """Student -> side -> the finished runs with the side's learning rate, by seed. It is the best rate tried so far."""
    found: dict[Student, dict[str, list[dict[str, Any]]]] = {}
    for student in size.students:
        for side in sides:
            rate, _ = chosen_rate(side, student, size, done)
            records = [done.get(_run(student, side.name, rate, seed, size)) for seed in range(size.seeds)]
            if kept := [record for record in records if record and is_measured(record)]:
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
