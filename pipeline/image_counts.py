"""Counts the images of a source for a dry run: their bytes, their files, and the tokens that the teacher reads them as.

Tokens are counted for the first images and extrapolated: a processor must see an image to say how many it becomes. Rows
that the capture will reject after that, mostly because they are too long with their images, are counted among these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from coldstill.storage_schema.media import MAX_MEDIA_FILES

from .config import CaptureConfig
from .teachers.image_expansion import RowRejected
from .teachers.local_expansion import LocalExpander
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
    """Counts the images of sequences."""

    def __init__(self, processor: Any, config: CaptureConfig):
        """Raises `ProcessorUnusable`."""
        teacher, self._in_row_bytes = config.teacher, config.source.images_in_row_bytes
        self._expander = LocalExpander(processor, teacher)
        self._is_prompt = config.mode == "generate"
        self._sampled_rows = self._sampled_images = self._unfit = 0
        self._example = ""
        self._rows = self._images = self.bytes_in_rows = self._media_bytes = self._tokens = 0
        self._digests: set[bytes] = set()
        self._lengths: list[int] = []

    def add(self, sequence: TokenSequence) -> None:
        """Count the images of a sequence."""
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
        if sequence.media and self._sampled_images < _SAMPLED:
            self._sampled_rows += 1
            self._sampled_images += len(sequence.media)
            try:
                expanded = self._expander.expanded(sequence, is_prompt=self._is_prompt)
                self._lengths += expanded.expansion.lengths.tolist()
            except RowRejected as rejected:
                self._unfit += 1
                self._example = self._example or f"row {sequence.source_row}: {rejected.reason}: {rejected.detail}"

    def estimate(self) -> ImageEstimate:
        """The counts, with warnings: of rows that will be rejected, and if a manifest cannot list the files."""
        added = (np.mean(self._lengths) - 1) * self._images if self._lengths else 0
        warnings = []
        if self._unfit:
            warnings.append(
                f"the capture rejects {self._unfit} of the first {self._sampled_rows} rows with images too, such as "
                f"{self._example}"
            )
        if len(self._digests) > MAX_MEDIA_FILES:
            warnings.append(
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
            warning="; ".join(warnings) or None,
        )
