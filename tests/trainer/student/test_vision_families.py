"""The page of vision-language families says what the code does, and no cell of it is wrong."""

from __future__ import annotations

import pytest

from .vision_families import FAMILIES
from .vision_table import PAGE, cells


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_of_vision_models_is_up_to_date_and_no_cell_is_wrong(family: str) -> None:
    found = cells(family)
    assert "DIFFERENT" not in found
    assert f"| {family} | {' | '.join(found)} |\n" in PAGE.read_text(encoding="utf-8")
