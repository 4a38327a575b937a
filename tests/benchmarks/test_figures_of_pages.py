"""Figures of the documentation's tables are those of the stored results that the page links."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.draws.grid import kls_of, shares_of

DOCS = Path(__file__).parents[2] / "docs"
CELL = re.compile(r"(-?\d+\.\d+) \((-?\d+\.\d+) to (-?\d+\.\d+)\)")
"""A mean with the lowest and the highest value."""
PAGES = [page for page in sorted(DOCS.glob("*.md")) if CELL.search(page.read_text())]


def _lists(document: Any) -> Iterator[list[float]]:
    """Every list of numbers in a stored result."""
    if isinstance(document, dict):
        if document.get("command", "").startswith("make bench-quality"):  # which stores the mean of the shares alone
            yield from (of for of_sides in shares_of(document["log"], digits=9).values() for of in of_sides.values())
        for value in document.values():
            yield from _lists(value)
    elif isinstance(document, list):
        if document and all(isinstance(value, int | float) for value in document):
            yield document
        for value in document:
            yield from _lists(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_mean_with_its_lowest_and_highest_value_is_stored(page: Path) -> None:
    text = page.read_text()
    links = set(re.findall(r"\(\.\./(benchmarks/results/\w+\.json)\)", text))
    stored = [json.loads((DOCS.parent / link).read_text()) for link in links]
    found = [(statistics.mean(of), min(of), max(of)) for document in stored for of in _lists(document)]
    cells = [cell.groups() for line in text.splitlines() if line.startswith("|") for cell in CELL.finditer(line)]

    def is_stored(cell: tuple[str, ...]) -> bool:
        half = 0.5001 * 10 ** -len(cell[0].partition(".")[2])
        shown = tuple(map(float, cell))
        return any(all(abs(a - b) <= half for a, b in zip(shown, of, strict=True)) for of in found)

    assert [cell for cell in cells if not is_stored(cell)] == []


def _table(page: str, heading: str) -> dict[str, list[str]]:
    """The lines of the table below the line that begins with `heading`, by their first cell; nothing is bold."""
    _, _, below = (DOCS / page).read_text().replace("**", "").partition(f"\n{heading}")
    lines = takewhile(lambda line: line.startswith("|"), below.splitlines()[2:])
    rows = [[cell.strip() for cell in line[1:].removesuffix("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def _result(name: str) -> dict[str, Any]:
    return json.loads((DOCS.parent / f"benchmarks/results/{name}_2_cores.json").read_text())


def _ratio(over: list[float], under: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(over, under, strict=True)):.2f}"


def test_the_costs_of_a_step_are_medians_of_the_rounds_own_ratios() -> None:
    rounds = _result("step")["rounds"]
    sides = {
        "cross-entropy, the same trainer": "plain, fused",
        "cross-entropy, transformers' `Trainer`": "plain, Trainer",
        "TAID with the teacher in memory, as in the paper's code": "TAID, teacher resident",
    }

    def figures(side: str, what: str) -> list[float]:
        return [each[what] for each in rounds[side]]

    assert _table("training.md", "| | time of a step | peak memory |") == {
        "TAID from the cache": ["1", "1"],
        **{
            name: [_ratio(figures(side, what), figures("TAID, cache", what)) for what in ("step_s", "peak_bytes")]
            for name, side in sides.items()
        },
    }


def test_the_costs_of_a_loss_are_medians_of_the_rounds_own_ratios() -> None:
    cases = _result("loss")["cases"]
    sides = {
        "floor": "products alone",
        "cross-entropy in chunks": "fused cross-entropy",
        "TAID from the cache, in chunks": "fused sparse TAID, 16 draws",
        "TAID from the cache by autograd": "naive sparse TAID, 16 draws",
        "TAID with the teacher's dense logits": "dense TAID",
    }
    naive = cases["V 151936, naive cross-entropy"]
    assert _table("training.md", "| | time | memory above its inputs |") == {
        "cross-entropy by autograd on `[M, V]` logits": ["1", "1"],
        **{
            name: [_ratio(cases[f"V 151936, {side}"][what], naive[what]) for what in ("seconds", "peak_mb")]
            for name, side in sides.items()
        },
    }


@pytest.mark.parametrize(("teacher", "kind"), [("as trained", "flat"), ("sharpened", "sharp")])
def test_distances_to_dense_distillation_are_those_of_the_stored_runs(teacher: str, kind: str) -> None:
    table = _table("draws.md", f"| {kind}: kept of each position | bytes |")
    sides = {
        "K = 16, 64 independent draws, at most 32 stored": "K=16, D=64, iid, kept 32",
        "K = 8, 64 systematic draws": "K=8, D=64, systematic, kept 64",
        "K = 4, 64 systematic draws": "K=4, D=64, systematic, kept 64",
        "K = 8, 64 systematic draws with log-probs, control variate": "K=8, D=64, systematic+lp, kept 64",
    }

    def distance(result: str, side: str) -> str:
        kls = kls_of(_result(result)["runs"])[teacher]
        return f"{1000 * (statistics.mean(kls[side].values()) - statistics.mean(kls['dense TAID'].values())):.1f}"

    results = ("draws_300k", "draws") if kind == "flat" else ("draws_300k",)
    assert {name: cells[2:] for name, cells in table.items()} == {
        name: [distance(result, side) for result in results] for name, side in sides.items()
    }


def test_the_figures_of_rounds_are_those_of_the_stored_run() -> None:
    sides = {"before": "before", "three rounds": "rounds", "the source's answers": "text"}

    def cells(side: str) -> list[str]:
        (found,) = _result("rounds")["sides"][side]
        targets = f"{found['trained_targets']:,}" if found["trained_targets"] else ""
        return [f"{found['kl_on_own_answers']:.3f}", f"{found['kl_on_text']:.3f}", targets]

    assert _table("rounds.md", "| student | on its own answers |") == {
        name: cells(side) for name, side in sides.items()
    }


def test_the_bytes_of_ids_that_the_design_quotes_are_those_of_the_stored_run() -> None:
    lines = [
        line for line in _result("codec")["lines"] if (line["top_k"], line["draws"], line["min_prob"]) == (64, 0, 0)
    ]
    of = {line["side"]: line for line in lines if line["teacher"] == "flat"}
    ids = {side: sum(size for name, size in line["streams"].items() if "id" in name) for side, line in of.items()}
    fine, ranked, exact = (ids[f"ours, {side}"] for side in ("fine", "fine, id ranks", "exact"))
    text = " ".join((DOCS / "design.md").read_text().split())
    assert f"cost {fine:.0f} bytes at K = 64 instead of {exact:.0f} in rank order" in text
    assert f"at {of['ours, exact']['bytes'] / of['ours, fine']['bytes']:.1f} times the size" in text
    assert f"{1 - ranked / fine:.0%} of the id bytes at K = 64" in text
