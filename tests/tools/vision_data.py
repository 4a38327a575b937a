"""Small sealed datasets whose rows have images, in the rows and as files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow, MediaReference
from tests import making
from tests.vision import image_bytes

PLACEHOLDER = 7
SMALL, PHOTO, CAT, DOG = (
    image_bytes(1, size=(4, 4)),
    image_bytes(2, size=(60, 40), format="JPEG"),
    image_bytes(3, size=(30, 20)),
    image_bytes(4, size=(20, 30), format="WEBP"),
)
IN_ROW = len(SMALL)
_TYPES = {SMALL: "image/png", PHOTO: "image/jpeg", CAT: "image/png", DOG: "image/webp"}


def name_of(content: bytes) -> str:
    """The file that holds an image."""
    ending = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}[_TYPES[content]]
    return f"media/{hashlib.sha256(content).hexdigest()}.{ending}"


def vision_header(tokenizer: Path, *, about: dict[str, Any] | None = None, **changes: Any) -> DatasetHeader:
    """A header of a teacher that sees images, whose placeholder is `PLACEHOLDER`."""
    settings = {"image_token_id": PLACEHOLDER, "size": {"longest_edge": 64}, "do_image_splitting": True}
    processor = {"name": "SomeProcessor", "settings_sha256": "1" * 64, "settings": settings}
    facts = {"license": "CC0-1.0", "processor": processor, "media_in_row_bytes": IN_ROW}
    return making.tiny_header(tokenizer, about={**facts, **(about or {})}, **changes)


def vision_row(sample_id: str, images: Sequence[bytes], *, seed: int = 0) -> CachedRow:
    """A row with one placeholder per image at tokens 1, 3, 5 ...; its targets are text after the images."""
    row = making.random_row(np.random.default_rng(seed), sample_id, length=24)
    tokens = np.where(row.token_ids == PLACEHOLDER, 9, row.token_ids).astype(np.int32)
    places = [2 * number + 1 for number in range(len(images))]
    tokens[places] = PLACEHOLDER
    spans = np.array([[14, 23]], np.int32)
    probs = making.random_probs(np.random.default_rng(seed), 9, making.VOCABULARY)
    targets = making.targets_of(probs, tokens[15:24], top_k=8, draws=4, seed=seed)
    media = tuple(
        MediaReference(position=place, type=_TYPES[content], sha256=hashlib.sha256(content).hexdigest(), data=content)
        for place, content in zip(places, images, strict=True)
    )
    return dataclasses.replace(row, token_ids=tokens, target_spans=spans, targets=targets, media=media)


def vision_dataset(
    root: Path | str,
    tokenizer: Path,
    units: Sequence[Sequence[Sequence[bytes]]],
    *,
    header: DatasetHeader | None = None,
    seed: int = 0,
) -> Dataset:
    """A sealed dataset: units of rows, each given by its images. Ids are `SEED-UNIT-ROW`."""
    header = header or vision_header(tokenizer)
    shards = [
        [vision_row(f"{seed}-{unit}-{n}", images, seed=seed + 100 * unit + n) for n, images in enumerate(rows)]
        for unit, rows in enumerate(units)
    ]
    making.write_dataset(root, shards, header=header, tokenizer=tokenizer)
    return open_dataset(root)


def images_of(dataset: Dataset) -> dict[str, list[bytes]]:
    """The content of all images by sample id, each read through the dataset."""
    return {row.sample_id: [dataset.media_content(item) for item in row.media] for row in dataset.rows()}


def media_files(dataset: Dataset) -> set[str]:
    """The media files that the manifest lists, which are those in the folder."""
    listed = {file.name for file in dataset.manifest.files if file.name.startswith("media/")}
    assert {f"media/{name}" for name in dataset.store.names("media")} == listed
    return listed
