"""The images of a row as a terminal and a page show them: a line of facts each, and small pictures.

A stranger chose the content and its type. A picture on a page is made anew from the decoded pixels. Without PIL, it is
the stored content if that is small, under the type that its first bytes show. Whatever cannot be shown is a line.
"""

from __future__ import annotations

import base64
import importlib.util
import io
from typing import Any, NamedTuple

from coldstill.common.errors import ColdstillError
from coldstill.common.images import decoded, type_of_first_bytes
from coldstill.common.visible import visible
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.rows import CachedRow, MediaReference

MAX_PICTURES = 64
"""Different pictures on a page, each of at most `SIDE` x `SIDE` pixels: together a few megabytes."""
MAX_PIXELS = 1 << 27
"""Decoded for a page before no further picture is made: two of the largest images, or 120 of a megapixel."""
MAX_STORED_BYTES = 1 << 15
"""Of an image that is shown as it is stored, because PIL is not installed."""
SIDE = 320

_SHARP_PIXELS = 1 << 14
"""A smaller picture is stored without loss: its pixels are seen one by one."""
_MAX_KIND = 40


class ShownMedium(NamedTuple):
    """An image of a row: `position` of its placeholder, and its `label`, safe to show."""

    position: int
    label: str


def shown_media(dataset: Dataset, row: CachedRow) -> list[ShownMedium]:
    """The images of a row in order. No file is opened: sizes are those of the manifest."""
    media = enumerate(row.media, start=1)
    return [ShownMedium(item.position, _label(dataset, number, item)) for number, item in media]


def _label(dataset: Dataset, number: int, item: MediaReference) -> str:
    kind = visible(item.type.removeprefix("image/")[:_MAX_KIND])
    size = dataset.media_bytes(item)
    shown = f"{size:,} bytes" if size is not None else "a file that the manifest does not list"
    return f"[image {number}: {kind}, {shown}, sha256 {visible(item.sha256[:12])}]"


def page_media(dataset: Dataset, row: CachedRow, *, tokens: int) -> dict[str, list[Any]]:
    """What a page shows of the images at the first `tokens` tokens.

    `media`: of each image, `at`, the index of its placeholder, its `label`, and the number of its `picture`, or None.
    `pictures`: data URIs, each different image once.
    """
    pictures, media = _Pictures(dataset), []
    for shown, item in zip(shown_media(dataset, row), row.media, strict=True):
        if shown.position < tokens:
            number = pictures.number_of(item)
            problem = pictures.problems.get(item.sha256)
            label = f"{shown.label[:-1]}, not shown: {visible(problem)}]" if problem else shown.label
            media.append({"at": shown.position, "label": label, "picture": number})
    return {"media": media, "pictures": pictures.uris}


class _Pictures:
    """The pictures of a page, within its limits."""

    def __init__(self, dataset: Dataset):
        self.uris: list[str] = []
        self.problems: dict[str, str] = {}
        """Why an image cannot be read, by its digest."""
        self._dataset = dataset
        self._numbers: dict[str, int | None] = {}
        self._pixels = 0

    def number_of(self, item: MediaReference) -> int | None:
        """The place in `uris` of an image's picture; None if it is not shown."""
        if item.sha256 not in self._numbers:
            if len(self._numbers) >= MAX_PICTURES or self._pixels > MAX_PIXELS:
                return None
            uri = self._uri(item)
            self._numbers[item.sha256] = None if uri is None else len(self.uris)
            self.uris += [] if uri is None else [uri]
        return self._numbers[item.sha256]

    def _uri(self, item: MediaReference) -> str | None:
        try:
            data = self._dataset.media_content(item)
            if importlib.util.find_spec("PIL") is not None:
                return self._thumbnail(data)
        except ColdstillError as error:
            self.problems[item.sha256] = str(error.found)
            return None
        except MemoryError:
            self.problems[item.sha256] = "not enough memory"
            return None
        kind = type_of_first_bytes(data)
        return _data_uri(kind, data) if kind and len(data) <= MAX_STORED_BYTES else None

    def _thumbnail(self, data: bytes) -> str:
        image = decoded(data, where="an image")
        self._pixels += image.width * image.height
        image.thumbnail((SIDE, SIDE))
        is_small, file = image.width * image.height <= _SHARP_PIXELS, io.BytesIO()
        image.save(file, "PNG" if is_small else "JPEG", quality=85)
        return _data_uri("image/png" if is_small else "image/jpeg", file.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
