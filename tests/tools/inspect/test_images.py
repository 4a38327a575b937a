"""Images on the terminal and on a page: named where they stand, shown small, and never markup of a stranger."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.tools.inspect import row_media
from coldstill.tools.inspect.page import page_data, write_page
from coldstill.tools.inspect.row_facts import open_row
from coldstill.tools.inspect.terminal import show_row
from tests.fuzz.bases import read_files
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import change_row, written
from tests.storage_schema.hostile.test_media import sha256
from tests.tools.inspect.test_page import Parts
from tests.tools.vision_data import CAT, DOG, PHOTO, SMALL, vision_dataset
from tests.vision import image_bytes

SVG = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(2)</script></svg>"


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_folder: Path) -> Dataset:
    return vision_dataset(tmp_path / "dataset", tokenizer_folder, [[[SMALL, PHOTO, CAT], []]])


def shown(root: str, index: int = 0) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_row(root, index, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def pixels_of(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def policy_of(page: str) -> str:
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert found
    return found[1]


def hostile_dataset(dataset: Dataset, folder: Path, *items: tuple[str, bytes | str]) -> Path:
    """The dataset with other media in its first row, given as type and content, or as type and path."""
    tree = Tree(read_files(Path(dataset.store.root)))
    media = [
        {
            "position": 2 * number + 1,
            "type": kind,
            "sha256": "0" * 64 if isinstance(content, str) else sha256(content),
            "path": content if isinstance(content, str) else None,
            "bytes": None if isinstance(content, str) else content,
        }
        for number, (kind, content) in enumerate(items)
    ]
    change_row(tree, media=media)
    return written(tree, folder)


def bomb() -> bytes:
    """A PNG of 2^16 x 2^15 pixels in a few bytes: its header is whole, its data are not."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 1 << 16, 1 << 15, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_the_terminal_names_each_image_where_it_stands(dataset: Dataset) -> None:
    text = shown(dataset.store.url)
    labels = [
        f"[image {number}: {kind}, {len(content):,} bytes, sha256 {sha256(content)[:12]}]"
        for number, (kind, content) in enumerate([("png", SMALL), ("jpeg", PHOTO), ("png", CAT)], start=1)
    ]
    places = [text.replace("\n", "").index(label) for label in labels]
    assert places == sorted(places)
    assert "3 images" in text
    assert "[image" not in shown(dataset.store.url, 1)
    one = open_row(dataset.store.url, 0)
    assert labels[1] in one.text.row(one.row.token_ids.tolist(), instead={3: labels[1]})


def test_the_page_holds_small_pictures_of_the_images(dataset: Dataset, tmp_path: Path) -> None:
    data = page_data(open_row(dataset.store.url, 0))
    assert [(one["at"], one["picture"]) for one in data["media"]] == [(1, 0), (3, 1), (5, 2)]
    for uri, content in zip(data["pictures"], (SMALL, PHOTO, CAT), strict=True):
        np.testing.assert_array_equal(pixels_of(uri), np.asarray(Image.open(io.BytesIO(content))))
    page = write_page(dataset.store.url, 0, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "img-src data:; " in policy_of(page)
    assert policy_of(page).startswith("default-src 'none'; ")
    assert data["media"][1]["label"] in page.partition("<noscript>")[2]
    assert not re.search(r"https?://", page)


def test_a_page_without_pictures_allows_none(dataset: Dataset, tmp_path: Path) -> None:
    page = write_page(dataset.store.url, 1, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "img-src" not in page


def test_large_images_become_small_and_equal_ones_are_held_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    from tests.tools import vision_data

    large = image_bytes(9, size=(1300, 700), format="JPEG")
    vision_data._TYPES[large] = "image/jpeg"
    made = vision_dataset(tmp_path / "dataset", tokenizer_folder, [[[large, large, SMALL]]])
    data = page_data(open_row(made.store.url, 0))
    assert [one["picture"] for one in data["media"]] == [0, 0, 1]
    assert pixels_of(data["pictures"][0]).shape[:2] == (172, 320)
    assert sum(map(len, data["pictures"])) < 100_000


@pytest.mark.parametrize(
    "item",
    [
        ("image/svg+xml", SVG),
        ("image/png", SVG),
        ("text/html", b"<img src=x onerror=alert(1)>"),
        ("image/png", bomb()),
        ("image/jpeg", PHOTO[:200]),
        ("image/png", "media/gone.png"),
    ],
)
def test_what_is_no_image_is_a_line_and_never_markup(
    dataset: Dataset, tmp_path: Path, item: tuple[str, bytes | str]
) -> None:
    root = hostile_dataset(dataset, tmp_path / "hostile", item, ("image/jpeg", PHOTO), ("image/png", CAT))
    data = page_data(open_row(root, 0))
    assert [one["picture"] for one in data["media"]] == [None, 0, 1]
    assert data["media"][0]["label"].startswith("[image 1: ")
    assert ", not shown: " in data["media"][0]["label"]
    assert not any("not shown" in one["label"] for one in data["media"][1:])
    page = write_page(root, 0, tmp_path / "page.html").read_text(encoding="utf-8")
    sound = write_page(dataset.store.url, 0, tmp_path / "sound.html").read_text(encoding="utf-8")
    assert Parts(page).elements == Parts(sound).elements
    assert base64.b64encode(SVG).decode() not in page
    assert "<svg" not in page
    assert "[image 1: " in shown(str(root))


def test_the_pixels_that_a_page_decodes_are_bounded_together(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_media, "MAX_PIXELS", 4 * 4)
    data = page_data(open_row(dataset.store.url, 0))
    assert [one["picture"] for one in data["media"]] == [0, 1, None]  # the second exceeds what all may have
    monkeypatch.undo()
    monkeypatch.setattr(row_media, "MAX_PICTURES", 1)
    data = page_data(open_row(dataset.store.url, 0))
    assert [one["picture"] for one in data["media"]] == [0, None, None]


def test_without_pil_small_images_are_shown_as_stored_under_the_type_of_their_bytes(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "PIL" else real(name))
    monkeypatch.setattr(row_media, "decoded", pytest.fail)
    monkeypatch.setattr(row_media, "MAX_STORED_BYTES", len(CAT) - 1)
    root = hostile_dataset(dataset, tmp_path / "hostile", ("image/jpeg", SMALL), ("image/png", SVG), ("image/png", CAT))
    data = page_data(open_row(root, 0))
    assert [one["picture"] for one in data["media"]] == [0, None, None]
    assert data["pictures"] == [f"data:image/png;base64,{base64.b64encode(SMALL).decode()}"]
    json.dumps(data, allow_nan=False)


def test_a_type_of_any_length_is_shown_short(dataset: Dataset, tmp_path: Path) -> None:
    kind = "image/" + "x" * 100_000
    root = hostile_dataset(dataset, tmp_path / "hostile", (kind, SMALL), ("image/jpeg", PHOTO), ("image/webp", DOG))
    assert len(row_media.shown_media(open_dataset(root), open_dataset(root).row(0))[0].label) < 120
