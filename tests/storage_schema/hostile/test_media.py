"""Media of a stranger: each reference that breaks a law is named by reading or by `verify --deep`, without decoding."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import ColdstillError, FileDamaged, FileMissing, ForeignFile, InvalidRow
from coldstill.storage_schema.manifest import MANIFEST_NAME, is_dataset_file
from coldstill.storage_schema.rows import MAX_MEDIA, MAX_MEDIA_BYTES, CachedRow, MediaReference
from coldstill.tools.derive.subset import subset
from coldstill.tools.pull import pull
from coldstill.tools.verify import verify
from tests import making
from tests.fuzz.bases import read_files
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import change_row, written
from tests.storage_schema.hostile.test_names import plant
from tests.vision import image_bytes

IMAGE = 7
"""The placeholder of an image."""
SMALL, LARGE = image_bytes(1, size=(4, 4)), image_bytes(2, size=(24, 24), format="JPEG")
IN_ROW = len(SMALL)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


LARGE_NAME = f"media/{sha256(LARGE)}.jpg"


def vision_header(tokenizer: Path, **about: Any) -> Any:
    settings = {"image_token_id": IMAGE, "size": {"longest_edge": 64}}
    processor = {"name": "SomeProcessor", "settings_sha256": "0" * 64, "settings": settings}
    return making.tiny_header(tokenizer, about={"processor": processor, "media_in_row_bytes": IN_ROW, **about})


def vision_row(*, text: int = 9, sample_id: str = "row") -> CachedRow:
    """A row whose tokens 1 and 3 are placeholders; its targets are text."""
    rng = np.random.default_rng(0)
    tokens = np.full(12, text, np.int32)
    tokens[[1, 3]] = IMAGE
    spans = np.array([[5, 11]], np.int32)
    targets = making.targets_of(making.random_probs(rng, 6, making.VOCABULARY), tokens[6:12], top_k=8, draws=4)
    media = (
        MediaReference(position=1, type="image/png", sha256=sha256(SMALL), data=SMALL),
        MediaReference(position=3, type="image/jpeg", sha256=sha256(LARGE), data=LARGE),
    )
    return CachedRow(sample_id=sample_id, token_ids=tokens, target_spans=spans, targets=targets, media=media)


@pytest.fixture
def tree(tmp_path: Path, tokenizer_folder: Path) -> Tree:
    header = vision_header(tokenizer_folder)
    making.write_dataset(tmp_path / "made", [[vision_row()]], header=header, tokenizer=tokenizer_folder)
    return Tree(read_files(tmp_path / "made"))


def findings(tree: Tree, folder: Path) -> list[str]:
    return [one.error for one in verify(written(tree, folder / "dataset"), deep=True, progress=False)]


def items(**changes: Any) -> list[dict[str, Any]]:
    """The references of the row as stored, with `changes` in the first."""
    first = {"position": 1, "type": "image/png", "sha256": sha256(SMALL), "path": None, "bytes": SMALL}
    second = {"position": 3, "type": "image/jpeg", "sha256": sha256(LARGE), "path": LARGE_NAME, "bytes": None}
    return [{**first, **changes}, second]


def test_a_sound_dataset_has_no_findings(tree: Tree, tmp_path: Path) -> None:
    change_row(tree, media=items())
    assert findings(tree, tmp_path) == []


@pytest.mark.parametrize(
    ("media", "error"),
    [
        (items(sha256="0" * 64), "InvalidRow"),
        (items(sha256="0" * 63), "InvalidRow"),
        (items(bytes=None, path=LARGE_NAME), "FileDamaged"),  # the digest is that of another file
        (items(bytes=None, path=f"media/{'0' * 64}.png"), "FileMissing"),
        (items(bytes=None, path="media/../dataset.json"), "InvalidRow"),
        (items(bytes=None, path="dataset.json"), "InvalidRow"),
        (items(bytes=None, path="media/NUL.png"), "InvalidRow"),
        (items(bytes=None, path="media/a."), "InvalidRow"),
        (items(bytes=None, path=f"media/{'a' * 300}"), "InvalidRow"),
        (items(path=LARGE_NAME), "InvalidRow"),
        (items(bytes=None), "InvalidRow"),
        (items(position=-1), "InvalidRow"),
        (items(position=12), "InvalidRow"),
        (items(position=3), "InvalidRow"),
        (items(position=2), "InvalidRow"),  # not a placeholder
        (items()[::-1], "InvalidRow"),
        (items()[:1], "InvalidRow"),  # a placeholder without an image
        ([], "InvalidRow"),
        (items(type="image/jpeg"), "MediaTypeWrong"),
        (items(type="image/svg+xml"), "MediaTypeWrong"),
        (items(type="text/html"), "MediaTypeWrong"),
        (items(type="image/png\n<script>"), "InvalidRow"),
        (items(type="IMAGE/PNG"), "InvalidRow"),
        (items(bytes=b"<svg onload=alert(1)>", sha256=sha256(b"<svg onload=alert(1)>")), "MediaTypeWrong"),
        ([items()[0]] * (MAX_MEDIA + 1), "InvalidRow"),
    ],
)
def test_a_reference_that_breaks_a_law_is_named(
    tree: Tree, tmp_path: Path, media: list[dict[str, Any]], error: str
) -> None:
    change_row(tree, media=media)
    assert findings(tree, tmp_path) == [error]


def test_a_placeholder_more_than_media_is_named_at_writing_and_by_verify(tree: Tree, tmp_path: Path) -> None:
    row = vision_row(text=IMAGE)
    header = open_dataset(written(tree, tmp_path / "first")).header
    with pytest.raises(InvalidRow, match=r"placeholders of images \(token 7\)"):
        making.write_dataset(tmp_path / "bad", [[row]], header=header, tokenizer=tmp_path / "first" / "tokenizer")
    change_row(tree, token_ids=[IMAGE, *vision_row().token_ids.tolist()[1:]])
    assert findings(tree, tmp_path) == ["InvalidRow"]


def test_a_placeholder_is_no_label(tokenizer_folder: Path, tmp_path: Path) -> None:
    row = vision_row()
    tokens = row.token_ids.copy()
    tokens[[3, 8]] = [9, IMAGE]
    media = (row.media[0], dataclasses.replace(row.media[1], position=8))
    row = dataclasses.replace(row, token_ids=tokens, media=media)
    with pytest.raises(InvalidRow, match="target position 7"):
        making.write_dataset(tmp_path, [[row]], header=vision_header(tokenizer_folder), tokenizer=tokenizer_folder)


def test_a_medium_larger_than_the_bound_is_refused_before_it_is_read(tree: Tree, tmp_path: Path) -> None:
    """A file of 1 TB that takes no room on the disk, under a manifest that tells its size."""
    root = written(tree, tmp_path / "dataset")
    document = json.loads((root / MANIFEST_NAME).read_bytes())
    for file in document["files"]:
        if file["name"] == LARGE_NAME:
            file["bytes"] = 1 << 40
    (root / MANIFEST_NAME).write_text(json.dumps(document))
    with (root / LARGE_NAME).open("r+b") as opened:
        opened.truncate(1 << 40)
    dataset = open_dataset(root)
    tracemalloc.start()
    with pytest.raises(FileDamaged, match=str(MAX_MEDIA_BYTES)):
        dataset.media_content(dataset.row(0).media[1])
    with pytest.raises(FileDamaged, match=str(MAX_MEDIA_BYTES)):
        subset(root, tmp_path / "subset", progress=False)
    assert "FileDamaged" in {one.error for one in verify(root, deep=True, progress=False)}  # at once: it is not read
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("changed", [LARGE[:-1] + b"?", LARGE + b"?", None])
def test_a_changed_or_lost_file_is_named(tree: Tree, tmp_path: Path, changed: bytes | None) -> None:
    root = written(tree, tmp_path / "dataset")
    (root / LARGE_NAME).unlink()
    if changed is not None:
        (root / LARGE_NAME).write_bytes(changed)
    for deep in (True, False):
        found = verify(root, deep=deep, progress=False)
        assert {one.error for one in found} == {"FileMissing" if changed is None else "FileDamaged"}
        assert found[0].where == LARGE_NAME
    with pytest.raises(ColdstillError, match="media"):
        pull(root, tmp_path / "copy", progress=False)


def test_a_file_that_no_row_refers_to_is_listed(tree: Tree, tmp_path: Path) -> None:
    root = plant(written(tree, tmp_path / "dataset"), "media/unused.png", content=SMALL)
    assert verify(root, progress=False) == []
    assert [(one.where, one.error) for one in verify(root, deep=True, progress=False)] == [
        ("media/unused.png", "MediaUnused")
    ]
    subset(root, tmp_path / "subset", progress=False)  # the way out that the message names
    assert verify(tmp_path / "subset", deep=True, progress=False) == []


@pytest.mark.parametrize(
    "name",
    [
        "con",
        "CON.png",
        "nul.a.png",
        "com1",
        "LPT9.jpg",
        "a.png.",
        "a b.png",
        ".hidden",
        "ü.png",
        "a" * 256,
        "a:b",
        "a?",
    ],
)
def test_names_that_some_systems_cannot_have_are_foreign(tree: Tree, tmp_path: Path, name: str) -> None:
    assert not is_dataset_file(f"media/{name}")
    if len(name) < 250:
        root = plant(written(tree, tmp_path / "dataset"), f"media/{name}", content=SMALL)
        assert "ForeignFile" in {one.error for one in verify(root, progress=False)}
        with pytest.raises(ForeignFile):
            pull(root, tmp_path / "copy", progress=False)


def test_names_that_differ_only_in_case_are_foreign(tree: Tree, tmp_path: Path) -> None:
    root = plant(written(tree, tmp_path / "dataset"), LARGE_NAME.replace(".jpg", ".JPG"), content=b"another")
    assert [one.error for one in verify(root, progress=False)] == ["ForeignFile"]
    with pytest.raises(ForeignFile):
        pull(root, tmp_path / "copy", progress=False)


@pytest.mark.parametrize("name", ["console.png", "com10", "a-b_c.png", "0" * 64 + ".webp", "a" * 255, "-", "A"])
def test_other_names_are_files_of_a_dataset(name: str) -> None:
    assert is_dataset_file(f"media/{name}")


def test_rows_that_name_millions_of_files_end_at_the_first(tree: Tree, tmp_path: Path) -> None:
    change_row(tree, media=[{**items()[0], "bytes": None, "path": f"media/{n}"} for n in range(MAX_MEDIA)])
    with pytest.raises(FileMissing, match="media/0"):
        subset(written(tree, tmp_path / "dataset"), tmp_path / "subset", progress=False)
