"""Speed of capture: the tap, its floor, vLLM's public path and transformers.

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
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.command import is_quick, new_parser
from benchmarks.common.report import finish, load_average
from benchmarks.common.spread import Spread, ratio, verdict
from benchmarks.inputs import CACHE

TOP_KS = (16, 64, 128)
SHAPES = {8192: (4, 16, 200), 151936: (4, 4, 100)}
"""Vocabulary -> units, rows per unit, tokens per row."""

GOALS = {
    "tap_over_floor": 0.85,
    "tap_over_public": 0.95,
    "tap_over_public_large_vocabulary": 1.1,
    "tap_over_public_quarter_targets": 1.5,
}


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, store."""
    parser = new_parser(
        "capture",
        __doc__,
        make="bench-capture",
        takes="minutes",
        quick="fewer rounds and tokens",
        result="capture",
    )
    parser.parse_args(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from benchmarks.capture.occupancy import occupancy
    from benchmarks.capture.sides import sides_of
    from benchmarks.inputs.tiny_teachers import tiny_teacher

    quick = is_quick()
    rounds, top_ks = (3, (16, 128)) if quick else (5, TOP_KS)
    CACHE.mkdir(exist_ok=True)
    all_rates: dict[tuple[int, int], dict[str, list[float]]] = {}
    with tqdm(total=len(SHAPES) * len(top_ks) * (rounds + 1) * 10, desc="capture", unit=" runs") as bar:
        for vocabulary, (units, rows, tokens) in SHAPES.items():
            for top_k in top_ks:
                bar.set_postfix_str(f"V {vocabulary:,}, K {top_k}")
                sides = sides_of(vocabulary, top_k, units=2 if quick else units, rows=rows, tokens=tokens)
                all_rates[vocabulary, top_k] = measured(sides, rounds=rounds, bar=bar)
    places = occupancy(tiny_teacher(CACHE, vocabulary=8192), vocabulary=8192, units=3 if quick else 6)
    figures = _figures(all_rates, places)
    _print(all_rates, figures, places)
    finish("capture", figures, command="make bench-capture", quick=quick)


def _figures(all_rates: dict[tuple[int, int], dict[str, list[float]]], places: dict[str, float]) -> dict[str, Any]:
    """Each ratio's smallest value over V and K, with its quartiles and its verdict."""
    large = max(SHAPES)

    def smallest(over: str, under: str, vocabularies: Sequence[int]) -> Spread:
        cases = [rates for (vocabulary, _), rates in all_rates.items() if vocabulary in vocabularies]
        return min(ratio(rates[over], rates[under]) for rates in cases)

    ratios = {
        "tap_over_floor": smallest("tap, exact", "floor", list(SHAPES)),
        "tap_over_public": smallest("tap, exact", "public", list(SHAPES)),
        "tap_over_public_large_vocabulary": smallest("tap, exact", "public", [large]),
        "tap_over_public_quarter_targets": smallest("tap, exact, a quarter", "public, a quarter", list(SHAPES)),
    }
    costs = [ratio(rates["tap, exact"], rates["tap, exact, draws"]).middle for rates in all_rates.values()]
    return {
        **{name: round(middle, 3) for name, (middle, _, _) in ratios.items()},
        "draws_cost": round(max(costs), 3),
        **{f"occupancy_{order}": round(share, 3) for order, share in places.items()},
        "quartiles": {name: [round(low, 3), round(high, 3)] for name, (_, low, high) in ratios.items()},
        "verdicts": {name: verdict(ratios[name], goal) for name, goal in GOALS.items()},
        "load_average": load_average(),
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
                f"{ratio(values, rates['floor']).middle:.2f}",
            )
        console.print(table)
    console.print(", ".join(f"occupancy {order}: {share:.2f}" for order, share in places.items()))
    for name, found in figures["verdicts"].items():
        console.print(f"{name}: {figures[name]:.2f}, {found}")


if __name__ == "__main__":
    main()
