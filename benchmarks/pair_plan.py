"""Which runs the benchmark of a real pair needs, which are done, and which learning rate each side takes.

The order is that of value: every side once, then the other learning rates, then the other orders of rows, then the
other students. A side's learning rate is the one with the lowest validation KL to the teacher, chosen with the main
student and the first order of rows; the test part has no say in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pair_runs import Run, Side, Size
from benchmarks.run_log import lines_of

Done = dict[Run, dict[str, Any]]


def read_log(log: Path) -> Done:
    """The records of the finished runs, by run."""
    return {run_of(record): record for record in lines_of(log)}


def run_of(record: dict[str, Any]) -> Run:
    """The run that a record is of."""
    return Run(record["layers"], record["side"], record["rate"], record["seed"], record["steps"])


def chosen_rate(side: Side, size: Size, done: Done) -> tuple[float, bool] | None:
    """The best learning rate of those tried, and whether all were tried; None if none was."""
    name = side.rate_of or side.name
    tried = {rate: done.get(Run(size.layers[0], name, rate, 0, size.steps)) for rate in size.rates}
    kls = {rate: record["validation"]["kl"] for rate, record in tried.items() if record}
    if not kls:
        return None
    return min(kls, key=lambda rate: kls[rate]), len(kls) == len(tried)


def planned(sides: tuple[Side, ...], size: Size, done: Done) -> Iterator[tuple[Run, Side, bool]]:
    """Every run in order, its side, and whether its learning rate is final. One that is not has the first rate."""
    main, *others = size.layers
    for rate in size.rates:
        for side in sides:
            if side.rate_of is None or rate == size.rates[0]:
                yield Run(main, side.name, rate, 0, size.steps), side, True
    later = [(main, seed) for seed in range(size.seeds)]
    later += [(layers, seed) for seed in range(size.seeds) for layers in others]
    for layers, seed in later:
        for side in sides:
            rate, is_final = chosen_rate(side, size, done) or (size.rates[0], False)
            was_tried = layers == main and seed == 0 and (side.rate_of is None or rate == size.rates[0])
            if not was_tried:
                yield Run(layers, side.name, rate, seed, size.steps), side, is_final


def reported(sides: tuple[Side, ...], size: Size, done: Done) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Layers -> side -> the finished runs with the side's learning rate, by seed. The rate is the best tried so far."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for layers in size.layers:
        for side in sides:
            if choice := chosen_rate(side, size, done):
                run = Run(layers, side.name, choice[0], 0, size.steps)
                records = [done.get(replace(run, seed=seed)) for seed in range(size.seeds)]
                if kept := [record for record in records if record]:
                    found.setdefault(layers, {})[side.name] = kept
    return found


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
