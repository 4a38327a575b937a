"""The sides, students and amounts of a real pair, which runs are needed and done, and each side's learning rate.

The order is that of value. First comes the main comparison: the main sides with each learning rate, then with the other
orders of rows. The other sides and students follow, with the first rate and one order. The learning rate of a main side
is the one with the lowest validation KL to the teacher, chosen with the first order; the test part has no say in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.run_log import lines_of
from benchmarks.common.shares import shares_of_gain
from benchmarks.inputs.real_text import HEALING

HELD_OUT = ("validation", "test")
LOG = "runs.jsonl"
TABLE_WIDTH = 110


@dataclass(frozen=True)
class Side:
    """A loss, from the cache or, where `dense`, from the teacher's whole distribution.

    `is_main`: whether it is trained with every learning rate and in every order of rows. `rate_of`: the side whose
    learning rate this one takes; by default the first one.
    """

    name: str
    loss: dict[str, Any]
    is_main: bool = False
    dense: bool = False
    rate_of: str | None = None


CROSS_ENTROPY = Side("cross-entropy", {"name": "cross_entropy"}, is_main=True)
TAID = Side("TAID, adaptive", {"name": "taid"}, is_main=True)
DENSE = Side("dense TAID", {"name": "taid"}, dense=True, rate_of=TAID.name)
SIDES = (
    CROSS_ENTROPY,
    Side("forward KL", {"name": "forward_kl"}, is_main=True),
    TAID,
    DENSE,
    Side("TAID, t from 0.8", {"name": "taid", "t_start": 0.8}),
    Side("reverse KL", {"name": "reverse_kl"}),
    Side("reverse KL, tail by draws", {"name": "reverse_kl", "tail": "forward_kl"}),
    Side("TAID, linear", {"name": "taid", "schedule": "linear"}),
)


@dataclass(frozen=True)
class Student:
    """A student before training: the teacher with `layers` of its layers, trained on plain text since if `healed`."""

    layers: int
    healed: bool

    @property
    def name(self) -> str:
        """Its name in tables and folders."""
        return f"{self.layers} layers, {'healed' if self.healed else 'as cut'}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is captured, trained and measured. Rows have up to `max_length` tokens.

    `steps`: optimizer steps of a run. `students`: the main one first. The main comparison, of the main student and the
    main sides, has each of the learning `rates`, the first one first, and `seeds` orders of rows; every other run has
    the first rate and one order.
    `healing_steps` and `healing_rate`: of the training on plain text, `rows_per_step` blocks of `max_length` tokens a
    step. `embeddings`: whether the student's embeddings, which are its head too, are trained. `toy_steps`: steps of the
    toy teacher; 0 for the real one.
    """

    rows: dict[str, int]
    rows_per_step: int
    steps: int
    students: tuple[Student, ...]
    rates: tuple[float, ...]
    seeds: int
    healing_steps: int
    healing_rate: float
    max_length: int = 256
    embeddings: bool = False
    toy_steps: int = 0

    @property
    def is_toy(self) -> bool:
        """Whether the teacher is the toy."""
        return self.toy_steps > 0


@dataclass(frozen=True)
class Run:
    """One training run."""

    layers: int
    healed: bool
    side: str
    rate: float
    seed: int
    steps: int

    @property
    def student(self) -> Student:
        """The student that it trains."""
        return Student(self.layers, self.healed)

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return f"{self.student.name}, {self.side}, rate {self.rate:g}, seed {self.seed}, {self.steps} steps"


FULL = Size(
    rows={"train": 660, "validation": 24, "test": 60, HEALING: 1400},
    rows_per_step=3,
    steps=220,
    students=(Student(8, healed=True), Student(8, healed=False), Student(6, healed=True)),
    rates=(5e-4, 1e-3, 2e-4),
    seeds=3,
    healing_steps=220,
    healing_rate=1e-3,
)
QUICK = Size(
    rows={"train": 120, "validation": 8, "test": 16, HEALING: 60},
    rows_per_step=4,
    steps=30,
    students=(Student(3, healed=True),),
    rates=(2e-3,),
    seeds=1,
    healing_steps=10,
    healing_rate=2e-3,
    toy_steps=100,
)
Done = dict[Run, dict[str, Any]]


def settings(size: Size) -> dict[str, Any]:
    """The settings as a stored result has them."""
    return dict(json.loads(json.dumps(asdict(size))))


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
    return shares_of_gain(kls, floor=floor, dense=dense)
