"""The losses, models and amounts of the capacity benchmark, which runs are needed and done, and each learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.common.report import stored
from benchmarks.common.run_log import lines_of
from coldstill.common.files import read_json
from coldstill.demo.settings import Shape

STUDENT = Shape(width=64, layers=2, heads=2, feed_forward=192, seed=0)
TEACHERS = {
    "1x": STUDENT,
    "3x": Shape(width=128, layers=3, heads=4, feed_forward=320, seed=0),
    "10x": Shape(width=192, layers=5, heads=4, feed_forward=512, seed=0),
    "30x": Shape(width=288, layers=6, heads=6, feed_forward=896, seed=0),
}
"""Name -> shape; the name is the rounded ratio of parameters to the student's."""
LOSSES: dict[str, dict[str, Any]] = {
    "SFT": {"name": "cross_entropy"},
    "forward KL": {"name": "forward_kl"},
    "reverse KL": {"name": "reverse_kl"},
    "adaptive KL": {"name": "adaptive_kl"},
    "skew KL": {"name": "skew_forward_kl"},
    "TAID": {"name": "taid"},
}
"""Name in tables -> settings of the loss, all with their defaults."""
MORE_TEXT = ", all text"
"""Behind a teacher's name: it read all of the teachers' part, about five times as much. A student that passes four
times over its own text is not behind the other teachers, so they have little to teach it."""
STUDIED: dict[str, dict[str, Any]] = {
    "TAID, t from 0.2": {"name": "taid", "t_start": 0.2},
    "TAID, t from 0.8": {"name": "taid", "t_start": 0.8},
}
"""Of the study of where TAID's advantage begins, beside forward KL and TAID."""
SETTINGS = ("pre-training", "instruction pairs")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Amounts. `rows`, `rows_per_step`, `rates`: by setting; the first rate is tried first. `held_out`: rows of each
    part. `student_tokens`: of the student's own pre-training, before instruction pairs."""

    teacher_tokens: int
    student_tokens: int
    rows: dict[str, int]
    rows_per_step: dict[str, int]
    rates: dict[str, tuple[float, ...]]
    held_out: int
    teachers: tuple[str, ...]
    main_teacher: str
    seeds: int
    better_teacher: str
    """Of the long runs."""
    better_tokens: int
    """That it reads at most."""
    long_rates: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Run:
    """One training run. SFT learns from the text alone; its teacher is the one that it is measured against."""

    setting: str
    loss: str
    teacher: str
    rate: float
    seed: int
    passes: int = 1

    @property
    def folder(self) -> str:
        """Its folder's name."""
        passes = f"{self.passes} passes"
        return f"{self.setting}, {self.loss}, {self.teacher}, rate {self.rate:g}, seed {self.seed}, {passes}"


FULL = Size(
    teacher_tokens=500_000,
    student_tokens=200_000,
    rows={"pre-training": 1200, "instruction pairs": 1200},
    rows_per_step={"pre-training": 4, "instruction pairs": 8},
    rates={"pre-training": (4e-3, 8e-3, 2e-3, 1e-3), "instruction pairs": (2e-3, 4e-3, 1e-3, 8e-3)},
    held_out=60,
    teachers=("1x", "3x", "10x", "30x"),
    main_teacher="10x",
    seeds=3,
    better_teacher="10x" + MORE_TEXT,
    better_tokens=10**9,
    long_rates={"pre-training": (4e-3, 8e-3, 2e-3), "instruction pairs": (8e-3, 4e-3, 2e-3, 16e-3)},
)
QUICK = Size(
    teacher_tokens=40_000,
    student_tokens=20_000,
    rows={"pre-training": 60, "instruction pairs": 60},
    rows_per_step={"pre-training": 4, "instruction pairs": 8},
    rates={"pre-training": (4e-3,), "instruction pairs": (2e-3,)},
    held_out=6,
    teachers=("1x", "3x"),
    main_teacher="3x",
    seeds=1,
    better_teacher="3x" + MORE_TEXT,
    better_tokens=80_000,
    long_rates={"pre-training": (4e-3,), "instruction pairs": (2e-3,)},
)
RUN_KEYS = tuple(field.name for field in fields(Run))
STUDY_PASSES = (1, 4)
LONG_PASSES = 4
LONG_LOSSES = ("SFT", "forward KL", "adaptive KL", "TAID", "TAID, t from 0.8")
Done = dict[Run, dict[str, Any]]


def read(log: Path) -> Done:
    """The records of the finished runs, by run."""
    return {Run(**{name: record[name] for name in RUN_KEYS if name in record}): record for record in lines_of(log)}


def chosen_rate(setting: str, loss: str, size: Size, done: Done, *, is_long: bool = False) -> tuple[float, bool]:
    """The best learning rate of those tried, the first one if none was, and whether all were tried."""
    if is_long:
        tried = {rate: _long_run(setting, loss, size, rate, 0) for rate in size.long_rates[setting]}
    else:
        tried = {rate: Run(setting, loss, size.main_teacher, rate, 0) for rate in size.rates[setting]}
    values = {rate: done[run]["validation"]["cross_entropy"] for rate, run in tried.items() if run in done}
    best = min(values, key=lambda rate: values[rate]) if values else next(iter(tried))
    return best, len(values) == len(tried)


def _long_run(setting: str, loss: str, size: Size, rate: float, seed: int) -> Run:
    return Run(setting, loss, size.better_teacher, rate, seed, LONG_PASSES)


def planned(size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    """Every run in the order of its value, and whether its learning rate is final.

    Both settings: the learning rates, then the other teachers. Then the study of TAID, other seeds, and long runs.
    """
    for setting in SETTINGS:
        for rate in size.rates[setting]:
            for loss in LOSSES:
                yield Run(setting, loss, size.main_teacher, rate, 0), True
        yield from _with_chosen_rates(setting, 0, size, done)
    yield from study(size, done)
    for setting in reversed(SETTINGS):  # the shorter runs first
        for seed in range(1, size.seeds):
            yield from _with_chosen_rates(setting, seed, size, done)
    for setting in SETTINGS:
        rates = size.long_rates[setting]
        tried = [_long_run(setting, loss, size, rate, 0) for rate in rates for loss in LONG_LOSSES]
        yield from ((run, True) for run in tried)
        yield from ((run, is_final) for run, is_final in long_runs(setting, size, done) if run not in tried)


def long_runs(setting: str, size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    """Runs with more passes, against a teacher that read more, with their learning rates and all seeds."""
    for seed in range(size.seeds):
        for loss in LONG_LOSSES:
            rate, is_final = chosen_rate(setting, loss, size, done, is_long=True)
            yield _long_run(setting, loss, size, rate, seed), is_final


def study(size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    """Where TAID's advantage begins: other first values of t, and more passes, for the main teacher and one seed."""
    for setting in SETTINGS if size.seeds > 1 else ():
        for passes in STUDY_PASSES:
            for loss in ("forward KL", "TAID", *STUDIED):
                rate, is_final = chosen_rate(setting, "TAID" if loss in STUDIED else loss, size, done)
                if passes > 1 or loss in STUDIED:
                    yield Run(setting, loss, size.main_teacher, rate, 0, passes), is_final


def _with_chosen_rates(setting: str, seed: int, size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    for teacher in (size.main_teacher, *(name for name in size.teachers if name != size.main_teacher)):
        for loss in LOSSES:
            if teacher == size.main_teacher and seed == 0:
                continue  # was tried with every rate
            if teacher == size.main_teacher or loss != "SFT":  # SFT has no teacher
                rate, is_final = chosen_rate(setting, loss, size, done)
                yield Run(setting, loss, teacher, rate, seed), is_final


def first_of_study(size: Size, done: Done) -> list[Run]:
    """The runs of the study that are also part of the main comparison."""
    losses = ("forward KL", "TAID")
    return [
        Run(setting, loss, size.main_teacher, chosen_rate(setting, loss, size, done)[0], 0)
        for setting in SETTINGS
        for loss in losses
    ]


def seconds_of_a_pass(done: Done) -> float:
    """Mean time of a pass of the finished runs; without any, of those of the stored result."""
    records = list(done.values()) or read_json(stored("capacity"))["log"]
    return statistics.mean(record["seconds"] / record.get("passes", 1) for record in records)
