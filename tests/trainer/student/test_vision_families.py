"""The page of vision-language families says what the code does, no cell of it is wrong, and refusals have a reason."""

from __future__ import annotations

import pytest

from coldstill.common.processor import ProcessorUnusable
from coldstill.trainer.data.images import StudentImages
from coldstill.trainer.student.images import image_probe

from .vision_families import FAMILIES, build
from .vision_table import PAGE, cells


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_of_vision_models_is_up_to_date_and_no_cell_is_wrong(family: str) -> None:
    found = cells(family)
    assert "DIFFERENT" not in found
    assert f"| {family} | {' | '.join(found)} |\n" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["Idefics2", "PaliGemma"])
def test_a_family_that_cannot_be_expanded_is_refused_with_what_is_wrong_with_it(family: str) -> None:
    """A newer release of transformers helps where the processor does not say how it expands, and only there."""
    model, processor = build(family)
    with pytest.raises(ProcessorUnusable) as caught:
        image_probe(StudentImages(processor, None, family), model)
    wanted, fix = str(caught.value.wanted), str(caught.value.fix)
    if family == "PaliGemma":
        assert "text of its own" in wanted
        assert "newer release" not in fix
    else:
        assert "return_text_replacement_offsets" in wanted
    assert "family" in fix
