"""Figures of the documentation's tables are those of the stored results that the page links."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.draws.grid import shares_of

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
