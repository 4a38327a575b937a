"""Makes vLLM's inputs of stored rows, with images expanded, in batches of bounded memory.

vLLM holds the tensors of a request's images from when it is added until the images are encoded, and all requests of a
batch are added before the first step. A unit of images could fill the machine's memory, so it becomes several batches,
one after the other. Their borders depend on the rows alone: equal calls have equal schedules. Decoded pixels are held
for one row at a time. A unit of text is one batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from coldstill.common.errors import first_line
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.teachers.image_expansion import (
    PROCESSOR_ERRORS,
    Expansion,
    ImageRules,
    RowRejected,
    as_stored,
    check_length,
    check_no_images,
    images_of,
    unsupported,
)
from coldstill.pipeline.teachers.protocol import TokenSequence

_BATCH_BYTES = 1 << 30
"""Tensors of images in one batch; a batch can exceed it by those of one row. An engine in processes of its own has a
copy of them."""

logger = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """A row, vLLM's inputs for it, and how its images are expanded in these."""

    sequence: TokenSequence
    inputs: Mapping[str, Any]
    expansion: Expansion


class RejectedPrompt(NamedTuple):
    """A row that vLLM does not get."""

    sequence: TokenSequence
    rejected: RowRejected


class PromptMaker:
    """Makes the prompts of one engine. Thread-safe if `render` is."""

    def __init__(
        self, render: Callable[[dict[str, Any]], Mapping[str, Any]], images: ImageRules | None, config: TeacherConfig
    ):
        """`render`: vLLM's inputs of a prompt with images. `images`: the rules of a teacher that sees them."""
        self._render, self._images, self._config = render, images, config

    def batches(
        self, sequences: Sequence[TokenSequence], *, is_answered: bool
    ) -> Iterator[list[Prompt | RejectedPrompt]]:
        """All rows in order; at least one batch. `is_answered`: they are prompts, which must leave room."""
        batch: list[Prompt | RejectedPrompt] = []
        size = 0
        for sequence in sequences:
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            try:
                prompt = self._made(sequence, is_answered)
                size += _tensor_bytes(prompt.inputs.get("mm_kwargs"))
                batch.append(prompt)
            except RowRejected as rejected:
                batch.append(RejectedPrompt(sequence, rejected))
        yield batch

    def _made(self, sequence: TokenSequence, is_answered: bool) -> Prompt:
        inputs: Mapping[str, Any] = {"prompt_token_ids": sequence.token_ids.tolist()}
        if self._images is None:
            check_no_images(sequence)
            return Prompt(sequence, inputs, as_stored(sequence))
        self._images.check_row(sequence)
        if not sequence.media:
            return Prompt(sequence, inputs, as_stored(sequence))
        images = images_of(sequence)
        try:
            inputs = self._render({**inputs, "multi_modal_data": {"image": images}})
        except PROCESSOR_ERRORS as error:
            logger.warning("row %r: %s", sequence.sample_id, first_line(error))
            raise unsupported(error) from error
        ranges = [(found.offset, found.length) for found in inputs.get("mm_placeholders", {}).get("image", ())]
        expansion = self._images.proven(sequence, inputs["prompt_token_ids"], ranges)
        check_length(sequence, expansion, config=self._config, is_prompt=is_answered)
        return Prompt(sequence, inputs, expansion)


def _tensor_bytes(part: Any) -> int:
    """Bytes of all tensors in nested mappings and lists of vLLM's items, each of which has its tensor as `data`."""
    if isinstance(part, Mapping):
        return sum(map(_tensor_bytes, part.values()))
    if isinstance(part, list | tuple):
        return sum(map(_tensor_bytes, part))
    if hasattr(part, "nbytes"):
        return int(part.nbytes)
    return _tensor_bytes(part.data) if hasattr(part, "data") else 0
