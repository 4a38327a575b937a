"""Turns stored rows with images into what a student reads: expanded token ids, moved targets, inputs of the images.

A stored row has one placeholder token for each image. `RowExpander` replaces it by the ids that the student's own
processor writes, and moves the target positions of the text after it.

Shape letters: `T` tokens of an expanded row, `N` its target positions, `P` its images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coldstill.common.errors import ColdstillError
from coldstill.common.images import ENDINGS, ImageUnsupported, decoded, image_type
from coldstill.common.processor import Expanded, ImageExpander, ProcessorUnusable, expanded_positions
from coldstill.storage_schema.errors import InvalidRow
from coldstill.storage_schema.rows import CachedRow, MediaReference
from coldstill.trainer.errors import RowTooLong, StudentSeesNoImages

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class StudentImages:
    """How a student reads images: by its `processor`, into rows of at most `context` tokens (None: no limit is known).

    It can be pickled, so loader workers get it with their stream. `name`: the student's, for errors. `virtual_tokens`:
    those that its prompt learning puts into the context beside each row.
    """

    processor: Any
    context: int | None
    name: str
    virtual_tokens: int = 0


class ReadRow(NamedTuple):
    """A row as a student reads it: `token_ids int64 [T]`, and its target `positions int64 [N]` among them."""

    token_ids: np.ndarray
    positions: np.ndarray


class ReadRows(NamedTuple):
    """Rows of a batch, and what a student's forward pass takes beside their tokens.

    `images`: the inputs that the processor made of all images in order, empty if the rows have none. `types`: 1 at each
    token that is a patch of an image, for each row.
    """

    rows: Sequence[ReadRow]
    images: dict[str, Any]
    types: Sequence[np.ndarray]


class Placed(NamedTuple):
    """A row and where it comes from: the dataset's URL, and the function that reads a medium of it."""

    row: CachedRow
    where: str
    content: Callable[[MediaReference], bytes]


class RowExpander:
    """Expands rows for one student, in one thread.

    **Memory.** The decoded images of a batch exist together while its processor runs: at most 192 MiB for each image
    (`MAX_IMAGE_PIXELS`), in one thread of each process that makes batches. Afterwards a batch holds the inputs of the
    model alone.
    """

    def __init__(self, student: StudentImages):
        """Raises `ProcessorUnusable`."""
        # A tokenizer of the tokenizers library cannot be used by two threads, such as those of training and evaluation.
        self._expander = ImageExpander(copy.deepcopy(student.processor))
        self._student = student
        # The id that the model replaces by patches comes first; others, such as InternVL's <img>, may be in text.
        patches = self._expander.processor.image_token_ids[0]
        self._reserved = np.array(sorted({patches, self._expander.placeholder_id}), np.int64)

    def expand(self, placed: Sequence[Placed]) -> ReadRows:
        """The rows as the student reads them.

        Raises the errors of `MediaReader.content` and of `decoded`, `InvalidRow`, `RowTooLong` and `ProcessorUnusable`,
        each with the row's sample id.
        """
        for each in placed:
            self._check_tokens(each)
        images = [_images_of(each) for each in placed]
        expanded, inputs = self._expanded([each.row for each in placed], images)
        rows = [self._moved(each, found) for each, found in zip(placed, expanded, strict=True)]
        return ReadRows(rows, inputs, [self._expander.token_types(row.token_ids) for row in rows])

    def _expanded(
        self, rows: Sequence[CachedRow], images: Sequence[Sequence[Image.Image]]
    ) -> tuple[list[Expanded], dict[str, Any]]:
        tokens, places = [row.token_ids for row in rows], [_places(row) for row in rows]
        try:
            return self._expander.expand(tokens, positions=places, images=images)
        except ProcessorUnusable as error:
            # The processor takes the images of all rows at once: find the row.
            for number, row in enumerate(rows):
                try:
                    self._expander.expand([tokens[number]], positions=[places[number]], images=[images[number]])
                except ProcessorUnusable as of_row:
                    raise of_row.at(f"row {row.sample_id!r}") from error
            raise

    def _moved(self, placed: Placed, expanded: Expanded) -> ReadRow:
        row, tokens, context = placed.row, expanded.token_ids, self._student.context
        virtual = self._student.virtual_tokens
        if row.media and context is not None and tokens.size > context - virtual:
            raise RowTooLong(
                f"row {row.sample_id!r} of {placed.where}",
                found=f"{tokens.size} tokens with its {len(row.media)} images expanded, {row.token_ids.size} stored",
                wanted=f"at most {context - virtual}, the context of the student {self._student.name}"
                + (f" beside its {virtual} virtual tokens" if virtual else ""),
                fix="choose a student with a longer context or a processor with fewer patches per image (such as a "
                "smaller size in its preprocessor_config.json), or make a dataset without this row",
            )
        positions = expanded_positions(row.positions, images=_places(row), lengths=expanded.lengths)
        return ReadRow(tokens, positions)

    def _check_tokens(self, placed: Placed) -> None:
        """A label is never a placeholder, and no token but those of images stands for one."""
        row, places = placed.row, _places(placed.row)
        if np.isin(row.positions + 1, places).any():
            raise InvalidRow(
                f"row {row.sample_id!r} of {placed.where}: target_spans",
                found="a target whose label is the placeholder of an image",
                wanted="targets on text",
            )
        is_reserved = np.isin(row.token_ids, self._reserved)
        is_reserved[places] = False
        if is_reserved.any():
            at = int(np.flatnonzero(is_reserved)[0])
            raise InvalidRow(
                f"row {row.sample_id!r} of {placed.where}: token {at}",
                found=f"id {row.token_ids[at]}, which is an image to the student {self._student.name}",
                wanted=f"such an id only where one of the row's {len(row.media)} images is",
                fix="make a dataset without this row, for example with coldstill subset",
            )


def require_no_images(placed: Sequence[Placed]) -> None:
    """Raise `StudentSeesNoImages` if a row of a student without a processor has an image."""
    for each in placed:
        if each.row.media:
            raise sees_no_images(f"row {each.row.sample_id!r} of {each.where}", f"{len(each.row.media)} images")


def sees_no_images(what: str, found: str) -> StudentSeesNoImages:
    """The error for a dataset with images and a student that reads text alone."""
    return StudentSeesNoImages(
        what,
        found=found,
        wanted="text alone, or a model that sees images, with its processor in the same folder",
        fix="set data.rows to without_images (coldstill evaluate: --rows without_images) to use the other rows only, "
        "or choose a vision-language model",
    )


def _places(row: CachedRow) -> np.ndarray:
    return np.array([item.position for item in row.media], np.int64)


def _images_of(placed: Placed) -> list[Image.Image]:
    """The images of a row, decoded."""
    found = []
    for number, item in enumerate(placed.row.media):
        where = f"row {placed.row.sample_id!r} of {placed.where}: image {number}"
        if item.type not in ENDINGS:
            raise ImageUnsupported(where, found=item.type[:80], wanted=f"one of {', '.join(ENDINGS)}")
        try:
            data = placed.content(item)
        except ColdstillError as error:
            raise error.at(where) from None
        if (found_type := image_type(data, where=where)) != item.type:
            raise ImageUnsupported(where, found=f"bytes of {found_type}", wanted=f"{item.type}, as the row says")
        found.append(decoded(data, where=where))
    return found
