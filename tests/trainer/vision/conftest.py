"""Students of two families that see images, and a dataset for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import vision

COUNTS = [1, 0, 2, 3, 0, 1, 2, 1]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "idefics3": vision.idefics3_model,
    "idefics3 with tiles": lambda folder: vision.idefics3_model(folder, splits=True),
    "llava": vision.llava_model,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.llava_model(tmp_path_factory.mktemp("llava"), seed=4)


@pytest.fixture(scope="module")
def dataset(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = vision.vision_rows(llava, COUNTS, size=(70, 40))
    root = tmp_path_factory.mktemp("data") / "dataset"
    return vision.vision_dataset(root, [rows[:5], rows[5:]], tokenizer=llava, in_row_bytes=8500)
