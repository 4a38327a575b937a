"""The pictures of README and site are those of the stored results, and show what their formulas say."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import site_pictures
from benchmarks.common.report import RESULTS
from benchmarks.site_pictures import CURVES, PICTURES, TEACHER

STORED_TEXT = (RESULTS / "demo_2_cores.txt").read_text(encoding="utf-8")
STORED = json.loads((RESULTS / "demo_2_cores.json").read_text(encoding="utf-8"))


def test_the_pictures_are_those_of_the_stored_results() -> None:
    assert (PICTURES / "demo.svg").read_text(encoding="utf-8") == site_pictures.terminal(STORED_TEXT)
    assert (PICTURES / "losses.svg").read_text(encoding="utf-8") == site_pictures.curves()
    assert (PICTURES / "first_screen.png").stat().st_size < 300_000


def test_the_text_of_the_demo_has_the_stored_figures() -> None:
    for name, student in STORED["students"].items():
        (line,) = (line for line in STORED_TEXT.splitlines() if line.startswith(f"│ {name} "))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:4] == [
            f"{student['kl_teacher_student']:.3f}",
            f"{student['cross_entropy']:.3f}",
            f"{student['top1_agreement']:.1%}",
        ]
    assert f"{STORED['capture']['targets']:,} targets" in STORED_TEXT


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.svg")), ids=lambda path: path.name)
def test_every_drawing_is_whole_and_loads_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert not [node for node in root.iter() if node.tag.rpartition("}")[2] in {"script", "image", "foreignObject"}]
    assert "url(http" not in text
    assert "@import" not in text


def test_text_of_a_terminal_is_no_markup() -> None:
    drawn = site_pictures.terminal("$ make <b>\n&amp;\n")
    assert [node.text for node in ElementTree.fromstring(drawn).iter() if node.tag.endswith("text")] == [
        "$ make <b>",
        "&amp;",
    ]


@pytest.mark.parametrize("name", CURVES)
def test_every_loss_is_zero_at_the_teacher_and_above_it_elsewhere(name: str) -> None:
    _, loss = CURVES[name]
    assert loss(TEACHER, TEACHER) == pytest.approx(0, abs=1e-12)
    assert all(loss(TEACHER, step / 100) > 0 for step in range(1, 100) if step != 100 * TEACHER)


def test_the_points_of_the_plot_are_sides_that_were_measured() -> None:
    kl = {"K=8, D=0": [0.9, 1.0], "K=8, D=64": [0.3]}
    sizes = [{"top_k": k, "draws": draws, "bytes": 10.0 * k} for k in (8, 16) for draws in ("none", "iid")]
    assert site_pictures._points(kl, sizes, "none", 0) == [(8, 80.0, pytest.approx(0.95))]
    assert site_pictures._points(kl, sizes, "iid", 64) == [(8, 80.0, pytest.approx(0.3))]
