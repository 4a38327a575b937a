"""A source adapter that names ids to score: `source.adapter: examples.debug.score_ids:with_ids`."""

from __future__ import annotations

from typing import Any

IDS = [5, 17, 42, 99]
"""In a real run, the ids that the student finds probable at each target token: a list of lists."""


def with_ids(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the column `student_ids`: one list for all of its target tokens."""
    return {**row, "student_ids": IDS}
