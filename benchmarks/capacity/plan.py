"""Which runs the capacity benchmark needs, which are done, and which learning rate each loss takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.capacity.runs import LOSSES, SETTINGS, STUDIED, Run, Size
from benchmarks.common.run_log import lines_of

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
)
SECONDS_OF_A_RUN = 18.5
"""On one core beside other programs: the mean of the 135 runs of `results/capacity_2_cores.json`."""
RUN_KEYS = tuple(field.name for field in fields(Run))
STUDY_PASSES = (1, 4)
Done = dict[Run, dict[str, Any]]


def read(log: Path) -> Done:
    """The records of the finished runs, by run."""
    return {Run(**{name: record[name] for name in RUN_KEYS if name in record}): record for record in lines_of(log)}


def chosen_rate(setting: str, loss: str, size: Size, done: Done) -> tuple[float, bool]:
    """The best learning rate of those tried, the first one if none was, and whether all were tried."""
    tried = {rate: done.get(Run(setting, loss, size.main_teacher, rate, 0)) for rate in size.rates[setting]}
    values = {rate: record["validation"]["cross_entropy"] for rate, record in tried.items() if record}
    best = min(values, key=lambda rate: values[rate]) if values else size.rates[setting][0]
    return best, len(values) == len(tried)


def planned(size: Size, done: Done) -> Iterator[tuple[Run, bool]]:
    """Every run in the order of its value, and whether its learning rate is final.

    Both settings: the learning rates, then the other teachers. Then the study of TAID, then other seeds.
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


def seconds_of_a_run(done: Done) -> float:
    """Mean time of the finished runs; without any, that of the stored result."""
    return statistics.mean(record["seconds"] for record in done.values()) if done else SECONDS_OF_A_RUN
