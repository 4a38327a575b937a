"""Counts the images of a source for a dry run: their bytes, their files, and the tokens that the teacher reads them as.

Tokens are counted for the first images and extrapolated: a processor must see an image to say how many it becomes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from coldstill.common.images import decoded
from coldstill.common.processor import ImageExpander
from coldstill.storage_schema.media import MAX_MEDIA_FILES

from .teachers.protocol import TokenSequence

_SAMPLED = 64
"""Images whose tokens are counted."""


class ImageEstimate(BaseModel):
    """The images of a whole capture."""

    model_config = ConfigDict(frozen=True)

    rows_with_images: int
    images: int
    image_bytes_in_rows: int = Field(description="Bytes of the images that are stored in rows, as often as they occur.")
    media_files: int = Field(description="Other images, each counted once: the files in media/.")
    media_bytes: int = Field(description="Bytes of those files.")
    tokens_with_images: int = Field(description="Tokens as the teacher reads them, from those of the first images.")
    warning: str | None = None


class ImageCounts:
    """Counts the images of sequences. `in_row_bytes`: the most that an image in a row may have."""

    def __init__(self, processor: Any, in_row_bytes: int):
        self._expander, self._in_row_bytes = ImageExpander(processor), in_row_bytes
        self._rows = self._images = self.bytes_in_rows = self._media_bytes = self._tokens = 0
        self._digests: set[bytes] = set()
        self._lengths: list[int] = []

    def add(self, sequence: TokenSequence) -> None:
        """Count the images of a sequence. Raises `ProcessorUnusable`."""
        self._tokens += sequence.token_ids.size
        self._rows += bool(sequence.media)
        self._images += len(sequence.media)
        for item in sequence.media:
            data, digest = item.data or b"", bytes.fromhex(item.sha256)[:8]
            if len(data) <= self._in_row_bytes:
                self.bytes_in_rows += len(data)
            elif digest not in self._digests:
                self._digests.add(digest)
                self._media_bytes += len(data)
        if sequence.media and len(self._lengths) < _SAMPLED:
            positions = np.array([item.position for item in sequence.media])
            images = [decoded(item.data or b"", where=item.sha256) for item in sequence.media]
            (expanded,), _ = self._expander.expand([sequence.token_ids], positions=[positions], images=[images])
            self._lengths += expanded.lengths.tolist()

    def estimate(self) -> ImageEstimate:
        """The counts, with a warning if a manifest cannot list the files."""
        added = (np.mean(self._lengths) - 1) * self._images if self._lengths else 0
        warning = None
        if len(self._digests) > MAX_MEDIA_FILES:
            warning = (
                f"a manifest lists at most about {MAX_MEDIA_FILES:,} media files: raise source.images_in_row_bytes, "
                f"or capture parts of the source and merge them"
            )
        return ImageEstimate(
            rows_with_images=self._rows,
            images=self._images,
            image_bytes_in_rows=self.bytes_in_rows,
            media_files=len(self._digests),
            media_bytes=self._media_bytes,
            tokens_with_images=self._tokens + round(float(added)),
            warning=warning,
        )
