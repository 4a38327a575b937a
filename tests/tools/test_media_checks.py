"""The type that a file's first bytes show, without PIL, is the one that PIL finds; verify names any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldstill.common.images import ENDINGS, FIRST_BYTES, image_type, type_of_first_bytes
from coldstill.storage_schema.dataset import open_dataset
from coldstill.tools.verify import verify
from tests.fuzz.bases import read_files
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import change_row, written
from tests.storage_schema.hostile.test_media import sha256
from tests.tools.vision_data import vision_dataset, vision_header
from tests.vision import image_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_first_bytes_show_what_pil_finds(kind: str) -> None:
    content = image_bytes(0, format=kind)
    assert type_of_first_bytes(content[:FIRST_BYTES]) == image_type(content, where="") == f"image/{kind.lower()}"


def test_each_type_that_is_read_is_shown() -> None:
    assert {type_of_first_bytes(image_bytes(0, format=kind)) for kind in FORMATS} == set(ENDINGS)


@pytest.mark.parametrize("content", [b"", b"<svg>", b"\x89PNG, nearly", b"RIFF0000WAVE", b"GIF90a", b"\xff\xd8"])
def test_other_bytes_show_no_image(content: bytes) -> None:
    assert type_of_first_bytes(content) is None


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("told", sorted(ENDINGS))
@pytest.mark.parametrize("with_processor", [True, False])
def test_verify_names_a_type_that_is_not_that_of_the_content(
    tmp_path: Path, tokenizer_folder: Path, kind: str, told: str, with_processor: bool
) -> None:
    about = {} if with_processor else {"processor": None}
    header = vision_header(tokenizer_folder, about=about)
    made = vision_dataset(tmp_path / "made", tokenizer_folder, [[[image_bytes(1, size=(4, 4))]]], header=header)
    content = image_bytes(5, size=(6, 6), format=kind)
    tree = Tree(read_files(Path(made.store.root)))
    change_row(tree, media=[{"position": 1, "type": told, "sha256": sha256(content), "path": None, "bytes": content}])
    found = [one.error for one in verify(written(tree, tmp_path / "dataset"), deep=True, progress=False)]
    assert found == ([] if told == f"image/{kind.lower()}" else ["MediaTypeWrong"])
    assert open_dataset(tmp_path / "dataset").row(0).media[0].type == told
