"""Expands the images of stored rows with the teacher's own processor, in this process."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coldstill.common.errors import first_line
from coldstill.common.processor import ImageExpander
from coldstill.pipeline.config import TeacherConfig
from coldstill.storage_schema.header import DatasetHeader

from .checkpoint import load_teacher_processor
from .image_expansion import (
    PROCESSOR_ERRORS,
    Expansion,
    ImageRules,
    as_stored,
    check_length,
    images_of,
    unsupported,
)
from .protocol import TokenSequence

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


class ExpandedRow(NamedTuple):
    """A row with its images expanded, what the model takes for them, and the images themselves."""

    expansion: Expansion
    inputs: dict[str, Any]
    images: list[Image.Image]


class LocalExpander:
    """Expands rows by a processor of transformers. Not thread-safe."""

    def __init__(self, processor: Any, config: TeacherConfig):
        """Raises `ProcessorUnusable`."""
        self.rules = ImageRules(processor, max_images=config.max_images)
        self._expander = ImageExpander(processor)
        self._config = config

    def expanded(self, sequence: TokenSequence, *, is_prompt: bool) -> ExpandedRow:
        """The row, proven. `is_prompt`: it must leave room for an answer. Raises `RowRejected`."""
        self.rules.check_row(sequence)
        if not sequence.media:
            return ExpandedRow(as_stored(sequence), {}, [])
        images, at = images_of(sequence), np.array([medium.position for medium in sequence.media])
        try:
            (made,), inputs = self._expander.expand([sequence.token_ids], positions=[at], images=[images])
        except PROCESSOR_ERRORS as error:
            log.warning("row %r: %s", sequence.sample_id, first_line(error))
            raise unsupported(error) from error
        offsets = at + np.cumsum(made.lengths) - made.lengths - np.arange(at.size)
        expansion = self.rules.proven(sequence, made.token_ids, zip(offsets, made.lengths, strict=True))
        check_length(sequence, expansion, config=self._config, is_prompt=is_prompt)
        return ExpandedRow(expansion, inputs, images)

    def token_types(self, expansion: Expansion) -> np.ndarray:
        """`int64 [E]`: 1 where a token is a patch of an image."""
        return self._expander.token_types(expansion.token_ids)


def image_rules(config: TeacherConfig, header: DatasetHeader) -> ImageRules | None:
    """The rules of rows with images, if the header has the teacher's processor. Raises as `load_teacher_processor`."""
    processor = load_teacher_processor(config) if header.about.processor else None
    return ImageRules(processor, max_images=config.max_images) if processor else None


def local_expander(config: TeacherConfig, header: DatasetHeader) -> LocalExpander | None:
    """The same rules with the processor that expands rows here."""
    processor = load_teacher_processor(config) if header.about.processor else None
    if processor is None:
        return None
    return LocalExpander(processor, config)
