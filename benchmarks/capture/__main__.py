"""Speed of capture: the tap, its floor, vLLM's public path and transformers.

    python -m benchmarks.capture      QUICK=1: fewer rounds and tokens, nothing is stored

Two tiny teachers with V = 8,192 and 151,936; K = 16, 64, 128. All sides run in one process with one OpenMP thread and
take turns in every round:

* bare prefill;
* the floor: prefill, head, top K and log-sum-exp, with results discarded;
* the tap to committed shards, in order `exact` and `fast`, without and with D = 64 draws;
* the public path, and transformers, to committed shards;
* tap and public path on rows of which a quarter of the positions are targets.

As in a worker, one unit is encoded and committed while the next is scored. Occupancy is the share of the engine's
places in use while it generates answers of different lengths.

Ratios are medians of the rounds' own ratios. If their quartiles enclose the goal, there is no verdict.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.capture.floor import install_floor, run_requests
from benchmarks.capture.occupancy import occupancy
from benchmarks.common.report import finish
from benchmarks.inputs import CACHE
from benchmarks.inputs.tiny_teachers import config_of, header_of, tiny_teacher, units_of_rows
from coldstill.pipeline.teachers.protocol import Teacher, TokenSequence, scored_of
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.store import Store

TOP_KS = (16, 64, 128)
DRAWS = 64
SHAPES = {8192: (4, 16, 200), 151936: (4, 4, 100)}
"""Vocabulary -> units, rows per unit, tokens per row."""

GOALS = {
    "tap_over_floor": 0.85,
    "tap_over_public": 0.95,
    "tap_over_public_large_vocabulary": 1.1,
    "tap_over_public_quarter_targets": 1.5,
}

Units = Sequence[Sequence[TokenSequence]]


def commit_all(teacher: Teacher, header: DatasetHeader, units: Units, *, overlapping: bool) -> None:
    """Score units and commit their shards, two at a time. Without `overlapping`, teacher calls run one by one."""
    one_at_a_time = nullcontext() if overlapping else threading.Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        store = Store(folder)

        def do(index: int) -> None:
            with one_at_a_time:
                scored = teacher.score(units[index])
            rows = [one.row for one in scored_of(scored)]
            commit_unit(store, index, rows=rows, rejects=[], header=header, environment={})

        for done in [threads.submit(do, index) for index in range(len(units))]:
            done.result()


def sides_of(vocabulary: int, top_k: int, *, units: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Side -> its call, and the number of tokens that it reads."""
    folder = tiny_teacher(CACHE, vocabulary=vocabulary)
    _, rows, tokens = SHAPES[vocabulary]
    full = units_of_rows(vocabulary=vocabulary, units=units, rows=rows, tokens=tokens, target_share=1.0)
    quarter = units_of_rows(vocabulary=vocabulary, units=units, rows=rows, tokens=tokens, target_share=0.25)
    plain = header_of(vocabulary=vocabulary, top_k=top_k)
    drawing = header_of(vocabulary=vocabulary, top_k=top_k, draws=DRAWS)
    derived = header_of(vocabulary=vocabulary, top_k=top_k, tail="derived")
    tap: Any = load_teacher(config_of(folder, top_k=top_k), plain)
    draws = load_teacher(config_of(folder, top_k=top_k), drawing)
    public = load_teacher(config_of(folder, top_k=top_k, tap="public"), derived)
    reference = load_teacher(config_of(folder, engine="transformers", top_k=top_k), plain)
    install_floor(tap._engine)
    everything = [sequence for unit in full for sequence in unit]
    calls: dict[str, Callable[[], None]] = {
        "bare prefill": lambda: run_requests(tap._engine, everything, top_k=None),
        "floor": lambda: run_requests(tap._engine, everything, top_k=top_k),
        "tap, exact": lambda: commit_all(tap, plain, full, overlapping=False),
        "tap, fast": lambda: commit_all(tap, plain, full, overlapping=True),
        "tap, exact, draws": lambda: commit_all(draws, drawing, full, overlapping=False),
        "tap, fast, draws": lambda: commit_all(draws, drawing, full, overlapping=True),
        "public": lambda: commit_all(public, derived, full, overlapping=False),
        "transformers": lambda: commit_all(reference, plain, full, overlapping=False),
        "tap, exact, a quarter": lambda: commit_all(tap, plain, quarter, overlapping=False),
        "public, a quarter": lambda: commit_all(public, derived, quarter, overlapping=False),
    }
    return {name: (call, sum(len(unit) for unit in full) * tokens) for name, call in calls.items()}


def measured(sides: dict[str, tuple[Callable[[], None], int]], *, rounds: int, bar: tqdm) -> dict[str, list[float]]:
    """Tokens per second of each side in each round, after one warm-up round."""
    rates: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, (call, tokens) in sides.items():
            started = time.perf_counter()
            call()
            if number:
                rates[name].append(tokens / (time.perf_counter() - started))
            bar.update()
    return rates


def ratio(rates: dict[str, list[float]], over: str, under: str) -> tuple[float, float, float]:
    """Median and quartiles of the rounds' ratios."""
    found = [a / b for a, b in zip(rates[over], rates[under], strict=True)]
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 2 else (min(found), found[0], max(found))
    return middle, low, high


def main() -> None:
    """Measure, print, store."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    quick = os.environ.get("QUICK", "") not in ("", "0")
    rounds, top_ks = (3, (16, 128)) if quick else (5, TOP_KS)
    CACHE.mkdir(exist_ok=True)
    all_rates: dict[tuple[int, int], dict[str, list[float]]] = {}
    with tqdm(total=len(SHAPES) * len(top_ks) * (rounds + 1) * 10, desc="capture", unit=" runs") as bar:
        for vocabulary, (units, _, _) in SHAPES.items():
            for top_k in top_ks:
                bar.set_postfix_str(f"V {vocabulary:,}, K {top_k}")
                sides = sides_of(vocabulary, top_k, units=2 if quick else units)
                all_rates[vocabulary, top_k] = measured(sides, rounds=rounds, bar=bar)
    places = occupancy(tiny_teacher(CACHE, vocabulary=8192), vocabulary=8192, units=3 if quick else 6)
    figures = _figures(all_rates, places)
    _print(all_rates, figures, places)
    finish("capture", figures, command="make bench-capture", quick=quick)


def _figures(all_rates: dict[tuple[int, int], dict[str, list[float]]], places: dict[str, float]) -> dict[str, Any]:
    """Each ratio's smallest value over V and K, with its quartiles and its verdict."""
    large = max(SHAPES)

    def smallest(over: str, under: str, vocabularies: Sequence[int]) -> tuple[float, float, float]:
        cases = [rates for (vocabulary, _), rates in all_rates.items() if vocabulary in vocabularies]
        return min(ratio(rates, over, under) for rates in cases)

    ratios = {
        "tap_over_floor": smallest("tap, exact", "floor", list(SHAPES)),
        "tap_over_public": smallest("tap, exact", "public", list(SHAPES)),
        "tap_over_public_large_vocabulary": smallest("tap, exact", "public", [large]),
        "tap_over_public_quarter_targets": smallest("tap, exact, a quarter", "public, a quarter", list(SHAPES)),
    }
    costs = [ratio(rates, "tap, exact", "tap, exact, draws")[0] for rates in all_rates.values()]
    return {
        **{name: round(middle, 3) for name, (middle, _, _) in ratios.items()},
        "draws_cost": round(max(costs), 3),
        **{f"occupancy_{order}": round(share, 3) for order, share in places.items()},
        "quartiles": {name: [round(low, 3), round(high, 3)] for name, (_, low, high) in ratios.items()},
        "verdicts": {name: _verdict(*ratios[name], goal) for name, goal in GOALS.items()},
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "tokens_per_s": {
            f"V {vocabulary}, K {top_k}": {
                name: {
                    "median": round(statistics.median(values), 1),
                    "least": round(min(values), 1),
                    "most": round(max(values), 1),
                }
                for name, values in rates.items()
            }
            for (vocabulary, top_k), rates in all_rates.items()
        },
    }


def _verdict(middle: float, low: float, high: float, goal: float) -> str:
    if low <= goal <= high:
        return f"no verdict: the quartiles {low:.2f} to {high:.2f} enclose the goal {goal}"
    return f"reaches {goal}" if middle >= goal else f"misses {goal}"


def _print(
    all_rates: dict[tuple[int, int], dict[str, list[float]]], figures: dict[str, Any], places: dict[str, float]
) -> None:
    console = Console()
    for (vocabulary, top_k), rates in all_rates.items():
        table = Table("side", "tokens/s", "min to max", "relative to floor", title=f"V = {vocabulary:,}, K = {top_k}")
        for name, values in rates.items():
            table.add_row(
                name,
                f"{statistics.median(values):,.0f}",
                f"{min(values):,.0f} to {max(values):,.0f}",
                f"{ratio(rates, name, 'floor')[0]:.2f}",
            )
        console.print(table)
    console.print(", ".join(f"occupancy {order}: {share:.2f}" for order, share in places.items()))
    for name, verdict in figures["verdicts"].items():
        console.print(f"{name}: {figures[name]:.2f}, {verdict}")


if __name__ == "__main__":
    main()
