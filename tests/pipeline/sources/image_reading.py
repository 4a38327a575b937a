"""Reads one image as a capture does, or returns the reason why it was rejected."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.conversation import RowUnusable
from coldstill.pipeline.sources.image_reader import ImageReader
from tests.vision import image_bytes

RED = image_bytes(1)


def image_file(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reader_of(path: str = "rows.jsonl", **settings: Any) -> ImageReader:
    return ImageReader(SourceConfig(path=path, **settings))


def read_image(content: bytes | str, path: str = "rows.jsonl", **settings: Any) -> bytes:
    (medium,) = reader_of(path, **settings).read([content], [5])
    assert medium.position == 5
    assert medium.data is not None
    return medium.data


def refusal_of(content: bytes | str, path: str = "rows.jsonl", **settings: Any) -> tuple[str, str]:
    with pytest.raises(RowUnusable) as caught:
        read_image(content, path, **settings)
    return str(caught.value.reason), caught.value.detail
