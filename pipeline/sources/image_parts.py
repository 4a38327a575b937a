"""Finds the images of a chat: content parts, `<image>` marks in text, and a column of images beside the messages.

In a chat without marks and image parts, the images of the column come before the first question, as TRL and nanoVLM
place them: The Cauldron, FineVision and most sets of questions about one image are so.

Each image becomes the content part `{type: image}` of its message, without content: that is what chat templates of
models that see images read. The row has the bytes of an image, or the place to read them from: a path or an address.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote_to_bytes

from coldstill.common.processor import ProcessorUnusable, placeholder_id
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.source_config import SourceConfig
from coldstill.storage_schema.rows import MediaReference

from .conversation import MARK, Conversation, RowUnusable, has_marks, is_image_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content = bytes | str
"""Bytes of an image, or the place where it is."""
ReadImages = Callable[[Sequence[Content], Sequence[int]], tuple[MediaReference, ...]]
"""From the contents of a row's images and the positions of their placeholders to the images."""

IMAGE_PART = {"type": "image"}
_ONE = "image"
"""A second name of the column, for rows with one image, where the settings leave the column at its default."""
_KEYS = ("image", "image_url", "source", "bytes", "base64", "data", "url", "path")
"""Fields of a part or of an image, in the order in which they are looked at: content before a place."""
_CONTENT = ("bytes", "base64", "data")
"""Those whose text is base64."""
_UNMARKED = "images without marks -> before the first question"
_NO_COLUMN = "no column of images"
_DATA = re.compile(r"data:[^,]*?(;base64)?,", re.IGNORECASE)


class RowImages:
    """The images of rows for one teacher: their limits, and their placeholders among the token ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: SourceConfig,
        processor: Any | ProcessorUnusable | None,
        *,
        most: int,
        read: ReadImages | None,
    ):
        """`processor`: that of a teacher that sees images, or why it cannot be loaded, which the first row with an
        image raises; None for one that reads text only. `most`: images of a row. `read`: reads their content."""
        self._unusable = processor if isinstance(processor, ProcessorUnusable) else None
        self.processor: Any | None = None if self._unusable else processor
        self.placeholder_id = None if self.processor is None else placeholder_id(self.processor)
        self.sees = processor is not None
        """Whether images of a chat are looked for."""
        self.most = most
        self._tokenizer, self._source, self._read = tokenizer, source, read

    def seen(self, chat: Conversation, columns: Mapping[str, Any]) -> Conversation:
        """A chat with its images, checked. Raises `RowUnusable`, `ProcessorUnusable`."""
        if not self.sees:
            if has_marks(chat) and any(columns.get(name) for name in image_columns(self._source)):
                raise _bad("the row has images, and the teacher reads text only")
            return chat
        chat = with_images(chat, columns, self._source)
        if chat.images:
            self.require_processor()
        if self.processor is None:
            return chat
        if len(chat.images) > self.most:
            detail = f"{len(chat.images)} images, at most {self.most}"
            raise RowUnusable(RejectReason.TOO_MANY_IMAGES, detail)
        for text in texts_of([chat.messages, chat.tools]):
            self.require_no_image_token(text)
        return chat

    def require_processor(self) -> None:
        """Raise `ProcessorUnusable` if the teacher's processor could not be loaded."""
        if self._unusable is not None:
            raise self._unusable

    def require_no_image_token(self, text: str) -> None:
        """Raise `RowUnusable` for a text with a token that the teacher reads as an image."""
        token = next((token for token in self._image_tokens if token in text), None)
        if token is not None:
            detail = f"a text holds {token}, which the teacher reads as part of an image"
            raise RowUnusable(RejectReason.PLACEHOLDERS_DIFFER, detail)

    def placeholders(self, token_ids: list[int], chat: Conversation | None) -> list[int]:
        """Indices of the images' placeholders in a row. Raises `RowUnusable` unless there is one for each image."""
        if self.processor is None:
            return []
        positions = [index for index, id_ in enumerate(token_ids) if id_ == self.placeholder_id]
        images = len(chat.images) if chat else 0
        if len(positions) != images:
            token = self._tokenizer.convert_ids_to_tokens(self.placeholder_id)
            detail = f"{len(positions)} placeholders {token} for {images} images"
            raise RowUnusable(RejectReason.PLACEHOLDERS_DIFFER, detail)
        return positions

    def media(self, chat: Conversation | None, positions: list[int]) -> tuple[MediaReference, ...]:
        """The images of a row with their content. Raises `RowUnusable`, `StorageFailed`, `ImageHostFailed`."""
        return self._read(chat.images, positions) if chat and self._read else ()

    @cached_property
    def _image_tokens(self) -> tuple[str, ...]:
        """The special tokens that stand for images and videos, which no text may hold."""
        processor = self.processor
        ids = {self.placeholder_id, *processor.image_token_ids, *processor.video_token_ids} if processor else set()
        return tuple(str(self._tokenizer.convert_ids_to_tokens(id_)) for id_ in sorted(filter(None, ids)))


class _Column(NamedTuple):
    """The images that a row has beside its messages."""

    name: str
    images: list[Content]


def image_columns(source: SourceConfig) -> tuple[str, ...]:
    """The columns that may hold a row's images."""
    is_default = source.images == SourceConfig.model_fields["images"].default
    return (source.images, _ONE) if is_default else (source.images,)


def column_images(columns: Mapping[str, Any], source: SourceConfig) -> list[Content]:
    """The images that a row has beside its text. Raises `RowUnusable`."""
    return _column(columns, source).images


def with_images(chat: Conversation, columns: Mapping[str, Any], source: SourceConfig) -> Conversation:
    """A chat with its images in order, and `IMAGE_PART` in their places. Raises `RowUnusable`.

    An image part without content, or else a mark, takes the next image of the column.
    """
    column = _column(columns, source)
    messages = chat.messages
    has_parts = any(is_image_part(part) for message in messages for part in _parts_of(message))
    if column.images and not has_parts:
        messages = [_with_marks_as_parts(message) for message in messages]
        if messages == chat.messages and (placed_first := _before_first_question(messages, len(column.images))):
            messages = placed_first
            chat = chat._replace(layout="; ".join(filter(None, (chat.layout, _UNMARKED))))
    following = iter(column.images)
    images: list[Content] = []
    taken = 0

    def of(part: dict[str, Any], what: str) -> Content:
        nonlocal taken
        if (content := _content_of(part, what)) is not None:
            return content
        if isinstance(part.get("index"), int) and part["index"] != taken:
            raise _bad(f"{what} has the index {part['index']}, and stands for image {taken} of its column")
        taken += 1
        return next(following, "")

    placed = []
    for number, message in enumerate(messages):
        parts: list[Any] = []
        for index, part in enumerate(_parts_of(message)):
            if is_image_part(part):
                images.append(of(part, f"image part {index} of message {number}"))
                parts.append(dict(IMAGE_PART))
            else:
                parts.append(_text_part(part))
        placed.append({**message, "content": parts} if isinstance(message["content"], list) else message)
    if taken != len(column.images):
        of_column = f"images in column {column.name!r}: {len(column.images)}" if column.images else _NO_COLUMN
        places = f"image parts without {', '.join(_KEYS)}" if has_parts else f"marks {MARK}"
        raise _bad(f"{of_column}; {places}: {taken}")
    questions = [message.get("content") for message in chat.messages if message["role"] == "user"]
    if not images and any(MARK in text for text in texts_of(questions)):
        # The placeholder of a family may be another text: its teacher would read the mark as text, and see no image.
        raise _bad(f"{_NO_COLUMN}, which source.images names, for a mark {MARK}")
    return chat._replace(messages=placed, columns=(*chat.columns, *image_columns(source)), images=tuple(images))


def texts_of(value: object) -> Iterator[str]:
    """All texts in messages or tools, names of fields too, in any order."""
    waiting = [value]
    while waiting:  # a stranger's JSON may be nested as deeply as Python's stack
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each


def _column(columns: Mapping[str, Any], source: SourceConfig) -> _Column:
    name = next((name for name in image_columns(source) if columns.get(name)), source.images)
    value = columns.get(name)
    listed: Sequence[object] = value if isinstance(value, list | tuple) else [value] if value else []
    images = []
    for number, each in enumerate(listed):
        if (content := _content_of(each, f"image {number} of column {name!r}")) is None:
            raise _bad(f"image {number} of column {name!r} is empty")
        images.append(content)
    return _Column(name, images)


def _content_of(value: object, what: str, *, depth: int = 0) -> Content | None:
    """The bytes or the place of an image, from any form that the field uses; None if there is neither."""
    if value is None or value in ("", b""):
        return None
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        return _of_address(value, what)
    if isinstance(value, Mapping) and depth < 2:
        for key in _KEYS:
            inner = value.get(key)
            if inner is None or inner in ("", b"", {}):
                continue
            if key in _CONTENT and isinstance(inner, str):
                return _decoded(inner, what) if not inner.startswith("data:") else _of_address(inner, what)
            return _content_of(inner, what, depth=depth + 1)
        return None
    raise _bad(f"{what} is of type {type(value).__name__}, neither a place nor bytes")


def _of_address(text: str, what: str) -> Content:
    """A place as it is; the content of a data URI."""
    if text[:5].lower() != "data:":
        return text
    head = _DATA.match(text)
    if head is None:
        raise _bad(f"{what} is a data URI without a comma")
    rest = text[head.end() :]
    return _decoded(rest, what) if head[1] else unquote_to_bytes(rest)


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(f"{what} is not base64: {error}") from None


def _parts_of(message: Mapping[str, Any]) -> list[Any]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _text_part(part: object) -> object:
    """A part without the null fields and fields of images that typed columns add: templates look at their names."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        return part
    kept = {name: value for name, value in part.items() if value is not None and name not in _KEYS}
    return {"type": "text", **kept} if isinstance(kept.get("text"), str) else kept


def _before_first_question(messages: list[dict[str, Any]], images: int) -> list[dict[str, Any]] | None:
    """The messages with image parts at the start of the first question; None if there is no question."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        return None
    content = messages[first]["content"]
    texts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    asked = {**messages[first], "content": [*(dict(IMAGE_PART) for _ in range(images)), *texts]}
    return [*messages[:first], asked, *messages[first + 1 :]]


def _with_marks_as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    texts = content if isinstance(content, list) else [content]
    if not any(MARK in text for part in texts if (text := _text_of(part)) is not None):
        return message
    parts: list[Any] = []
    for part in texts:
        text = _text_of(part)
        parts += [part] if text is None else _split_at_marks(text)
    return {**message, "content": parts}


def _text_of(part: object) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else None


def _split_at_marks(text: str) -> Iterator[dict[str, str]]:
    """Parts of a text with marks. A line end beside a mark belongs to the mark: templates write their own."""
    pieces = text.split(MARK)
    for number, piece in enumerate(pieces):
        if number:
            yield dict(IMAGE_PART)
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece.strip() or len(pieces) == 1:
            yield {"type": "text", "text": piece}


def _bad(detail: str) -> RowUnusable:
    return RowUnusable(RejectReason.BAD_IMAGES, detail)
