"""A row with an image that no dataset has, for the checks of an engine at its start."""

from __future__ import annotations

import hashlib
import io

import numpy as np

from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import MediaReference

from .image_expansion import ImageRules
from .protocol import TokenSequence

PROBE_TOKENS = 12
_POSITION = 3
_SIZE = (48, 64)
"""Rows and columns of pixels, which become the fewest tokens in most families."""


def image_probe(header: DatasetHeader, images: ImageRules, *, seed: int) -> TokenSequence:
    """Random tokens with an image of random pixels in place of one of them. All positions that may be are targets."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(header.token_count), list(images.reserved))
    token_ids = allowed[generator.integers(0, allowed.size, PROBE_TOKENS)].astype(np.int32)
    token_ids[_POSITION] = images.placeholder_id
    file = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (*_SIZE, 3), dtype=np.uint8)).save(file, "PNG")
    data = file.getvalue()
    medium = MediaReference(position=_POSITION, type="image/png", sha256=hashlib.sha256(data).hexdigest(), data=data)
    return TokenSequence(
        sample_id="self-check-image",
        source_row=0,
        token_ids=token_ids,
        target_spans=np.array([[0, _POSITION - 1], [_POSITION, PROBE_TOKENS - 1]], np.int32),
        media=(medium,),
    )
