"""`coldstill stats` and `coldstill card` count images, and say how the teacher's processor read them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileMissing
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.tools.card.card import write_card
from coldstill.tools.card_text import CARD_NAME
from coldstill.tools.stats.measure import OTHER_TYPES, Stats, measure_stats
from coldstill.tools.stats.table import bytes_per_target, show_stats
from tests.fuzz.bases import read_files
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import change_row, written
from tests.storage_schema.hostile.test_media import sha256
from tests.tools.vision_data import CAT, DOG, PHOTO, SMALL, vision_dataset

UNITS = [[[SMALL, PHOTO], [], [CAT]], [[PHOTO, PHOTO, SMALL], [DOG, SMALL]]]


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_folder: Path) -> Dataset:
    return vision_dataset(tmp_path / "dataset", tokenizer_folder, UNITS)


def shown(stats: Stats) -> str:
    console = Console(file=io.StringIO(), width=80)
    show_stats(stats, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_stats_count_images_and_the_bytes_that_are_stored(dataset: Dataset) -> None:
    stats = measure_stats(dataset.store.url, progress=False)
    assert stats.media == sum(len(images) for rows in UNITS for images in rows) == 8
    assert stats.media_bytes == 3 * len(SMALL) + len(PHOTO) + len(CAT) + len(DOG)
    assert stats.media_types == {"image/jpeg": 3, "image/png": 4, "image/webp": 1}
    assert (stats.row_media.count, stats.row_media.total, stats.row_media.most) == (5, 8, 3)
    assert Stats.model_validate_json(stats.model_dump_json()) == stats
    assert "8 (3 jpeg, 4 png, 1 webp), " in shown(stats)
    assert "images per row" in shown(stats)


def test_the_bytes_per_target_are_those_of_the_teachers_values(dataset: Dataset) -> None:
    """With the images in the rows they would say nothing of what a cached target costs."""
    stats = measure_stats(dataset.store.url, progress=False)
    of_images = stats.column_bytes["media"]
    assert of_images > len(SMALL)
    assert stats.bytes_per_target == (stats.bytes - of_images) / stats.targets
    assert "media" not in bytes_per_target(stats)


def test_stats_of_text_say_nothing_of_images(tmp_path: Path, tokenizer_folder: Path) -> None:
    text = vision_dataset(tmp_path / "text", tokenizer_folder, [[[], []]])
    stats = measure_stats(text.store.url, progress=False)
    assert "image" not in shown(stats)
    document = json.loads(stats.model_dump_json(exclude={"row_media", "media", "media_bytes", "media_types"}))
    earlier = Stats.model_validate(document)  # as a release without images wrote it
    assert (earlier.media, earlier.row_media.count) == (0, 0)
    assert earlier.entropy == stats.entropy


def test_types_of_a_stranger_are_counted_together(dataset: Dataset, tmp_path: Path) -> None:
    tree = Tree(read_files(Path(dataset.store.root)))
    items = [
        {"position": n, "type": f"image/x{n}", "sha256": sha256(b"x"), "path": None, "bytes": b"x"} for n in range(20)
    ]
    change_row(tree, media=items)
    stats = measure_stats(written(tree, tmp_path / "hostile"), progress=False)
    assert stats.media_types[OTHER_TYPES] == 20
    assert not [name for name in stats.media_types if name.startswith("image/x")]


def test_a_file_that_the_manifest_does_not_name_is_named(dataset: Dataset) -> None:
    root = Path(dataset.store.root)
    document = json.loads((root / MANIFEST_NAME).read_bytes())
    document["files"] = [file for file in document["files"] if not file["name"].startswith("media/")]
    (root / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(FileMissing, match="row '0-0-0'"):
        measure_stats(root, progress=False)


def test_the_card_tells_images_and_their_processor(dataset: Dataset) -> None:
    write_card(dataset.store.url, progress=False)
    card = Path(dataset.store.root, CARD_NAME).read_text(encoding="utf-8")
    assert "rows of text and images" in card
    assert "| Images | 8 (3 jpeg, 4 png, 1 webp), " in card
    assert f"| Image processor | SomeProcessor; digest of its settings {'1' * 64} |" in card
    (sizes,) = re.findall(r"\| Image sizes \| (.*) \|", card)
    assert "longest&#95;edge" in sizes
    assert "do&#95;image&#95;splitting" in sizes
    assert "image-text-to-text" in card.partition("\n---\n")[0]
    assert "images per row" in card
