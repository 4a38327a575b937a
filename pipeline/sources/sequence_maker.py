"""Makes token sequences from source rows: tokenizes, reads images, masks, rejects unusable rows.

For each row: a `TokenSequence`, several if the row is split, a prompt without targets in mode generate, or a `Reject`
with a reason; see `sequences.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from coldstill.common.processor import ProcessorUnusable, placeholder_id
from coldstill.pipeline.config import CaptureConfig, SourceConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable, TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.checkpoint import end_token_ids, load_teacher_processor, load_tokenizer
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import MediaReference

from .chat_template import ChatTemplate, Fitted
from .conversation import Conversation, RowUnusable, conversation_of, has_marks
from .dataset_rows import StoredSequences
from .files import SourceRow
from .image_parts import column_images, image_columns, texts_of, with_images
from .image_reader import ImageReader
from .loss_mask import LossMask
from .sequences import Document, OverLong, facts_of, joined, prompt, sample_id_of, split

Mode = Literal["score", "generate", "pretrain"]
Columns = dict[str, Any]
_MAX_LOST = 3
"""Maximum number of dropped parts that a reject names."""


class SequenceMaker:
    """Makes token sequences from the rows of one source with one tokenizer.

    Not thread-safe, because the tokenizer is not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: SourceConfig,
        max_length: int,
        mode: Mode = "score",
        documents: Literal["isolate", "concat"] = "isolate",
        stops: Iterable[int] = (),
        today: date | None = None,
        processor: Any | ProcessorUnusable | None = None,
        max_images: int = TeacherConfig.model_fields["max_images"].default,
        stored: StoredSequences | None = None,
    ):
        """`stops`: tokens at which the teacher stops, besides the tokenizer's end of sequence. `processor`: that of a
        teacher that sees images, or why it cannot be loaded, which the first row with an image raises; `max_images` of
        a row. `stored`: the rows are those of a dataset, scored as they are."""
        self.stored = stored
        self.tokenizer, self.source, self.max_length = tokenizer, source, max_length
        self._unusable = processor if isinstance(processor, ProcessorUnusable) else None
        processor = None if self._unusable else processor
        self.processor: Any | None = processor
        self._max_images = max_images
        self.template = ChatTemplate(tokenizer, source, today=today, processor=processor)
        self._placeholder_id = None if processor is None else placeholder_id(processor)
        self._images = ImageReader(source) if processor is not None else None
        self._loss_mask = LossMask(self.template, source.loss_on, stops)
        self._mode, self._documents = mode, documents
        self._layouts: Counter[str] = Counter()
        self._made: Callable[[int, Columns], Iterator[TokenSequence | Reject]] = {
            "score": self._scored,
            "generate": self._prompted,
            "pretrain": self._isolated,
        }[mode]
        if stored is not None:
            self._made = self._as_stored
        if mode == "pretrain" and documents == "concat" and tokenizer.eos_token_id is None:
            raise TeacherUnusable(
                tokenizer.name_or_path,
                found="a tokenizer without an end-of-sequence token",
                wanted="one, to separate documents",
                fix="set documents to isolate",
            )

    @classmethod
    def of(
        cls,
        config: CaptureConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        today: date | None = None,
        header: DatasetHeader | None = None,
    ) -> SequenceMaker:
        """The maker of a capture. Raises `TeacherUnusable` for a tokenizer that cannot be loaded, and
        `ProcessorUnusable` for the processor that the header of a dataset names.

        `today`: the date that the chat template gets. `header`: that of a dataset that was started, which has the date.
        It has no processor if an earlier release started it, or if the processor could not be loaded then: such a
        dataset has no images.
        """
        tokenizer = tokenizer or load_tokenizer(config.teacher)
        return cls(
            tokenizer,
            source=config.source,
            max_length=config.teacher.max_length,
            mode=config.mode,
            documents=config.documents,
            stops=end_token_ids(config.teacher, tokenizer),
            today=template_date_of(header) if header else today,
            processor=_processor_of(config.teacher, header),
            max_images=config.teacher.max_images,
            stored=StoredSequences(config.source.rows_of, tokenizer, writer_round=config.source.round)
            if config.source.rows_of is not None
            else None,
        )

    @property
    def template_date(self) -> date | None:
        """The date that the chat template gets; None if it asks for none, and in mode pretrain."""
        return None if self._mode == "pretrain" else self.template.date

    @property
    def template_sha256(self) -> str | None:
        """Digest of the chat template and its arguments; None in mode pretrain."""
        return None if self._mode == "pretrain" else self.template.sha256

    @property
    def end_token_ids(self) -> tuple[int, ...] | None:
        """Tokens that end an answer of the teacher, in every mode and engine; None in mode pretrain."""
        return None if self._mode == "pretrain" else self._loss_mask.end_token_ids

    @property
    def over_long(self) -> OverLong:
        """What happens to rows that are too long. Documents are cut unless they are split; prompts are rejected."""
        if self._mode == "generate":
            return "reject"
        if self._mode == "pretrain":
            return "split" if self._documents == "concat" or self.source.over_long == "split" else "cut"
        return self.source.over_long

    def sequences(self, rows: Iterable[SourceRow]) -> Iterator[TokenSequence | Reject]:
        """The sequences and rejects of the rows of one unit, in their order.

        A row that the template cannot mark is a reject here; `check` has already stopped the capture if it can mark
        none of the first rows.
        """
        if self._mode == "pretrain" and self._documents == "concat":
            yield from joined(map(self._document_or_reject, rows), max_length=self.max_length)
            return
        for row in rows:
            try:
                yield from self._of_row(row)
            except TemplateCannotMark as error:
                yield self._reject(row, RowUnusable(RejectReason.TEMPLATE_CANNOT_MARK, str(error.found)))

    def make(self, row: SourceRow) -> TokenSequence | Reject:
        """The first sequence of a row, or its reject. Raises `TemplateCannotMark`."""
        return next(self._of_row(row))

    def check(self, rows: Iterable[SourceRow]) -> list[RowUnusable | None]:
        """Make the sequences of the first rows of a source, before anything is started. Returns why each is unusable.

        Raises `TemplateCannotMark` if the template is missing, or cannot mark the assistant's tokens of a row and no
        other row has a target either.
        """
        problems: list[RowUnusable | None] = []
        unmarked: TemplateCannotMark | None = None
        for row in rows:
            try:
                problems.append(self._problem(row))
            except TemplateCannotMark as error:
                unmarked = unmarked or error
                problems.append(RowUnusable(RejectReason.TEMPLATE_CANNOT_MARK, str(error.found)))
        if unmarked and None not in problems:
            raise unmarked
        return problems

    def _problem(self, row: SourceRow) -> RowUnusable | None:
        """Why a row gives no sequence, None if it gives one."""
        try:
            made = list(self._made(row.number, _columns_of(row)))
        except RowUnusable as unusable:
            return unusable
        if any(isinstance(result, TokenSequence) for result in made):
            return None
        first = made[0]
        assert isinstance(first, Reject)
        reason = next(reason for reason in RejectReason if reason == first.reason)
        return RowUnusable(reason, first.detail)

    @property
    def layouts(self) -> tuple[str, ...]:
        """How the columns of recognized layouts were read, the most frequent one first."""
        return tuple(name for name, _ in self._layouts.most_common() if name)

    def _whole(self, fitted: Fitted) -> Conversation:
        """A chat of which the template drops nothing. Raises `RowUnusable`."""
        if not fitted.lost:
            return fitted.chat
        named = "; ".join(part.what for part in fitted.lost[:_MAX_LOST])
        more = len(fitted.lost) - _MAX_LOST
        detail = f"{named}; and {more} more" if more > 0 else named
        raise RowUnusable(RejectReason.TEMPLATE_DROPS, detail, lost=frozenset(part.kind for part in fitted.lost))

    def _of_row(self, row: SourceRow) -> Iterator[TokenSequence | Reject]:
        try:
            yield from self._made(row.number, _columns_of(row))
        except RowUnusable as unusable:
            yield self._reject(row, unusable)

    def _scored(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        chat = self._chat(columns, answered=True)
        if chat is None:
            used: tuple[str, ...] = self._text_columns
            token_ids = self._tokens(columns)
            loss_mask = [True] * len(token_ids)
        else:
            used = chat.columns
            self._layouts[chat.layout] += 1
            learned = chat.learned_reasoning(last_turn=self.source.loss_on == "last_turn")
            chat = self._whole(self.template.fitted(chat, learned=learned))
            token_ids, loss_mask = self._loss_mask.ids_and_loss_mask(chat)
        positions = self._placeholders(token_ids, chat)
        for position in positions:  # a teacher predicts text only
            loss_mask[position] = False
        facts = facts_of(number, columns, self.source, used=used)
        if len(token_ids) <= self.max_length or self.over_long != "reject":
            facts = facts._replace(media=self._media(chat, positions))
        yield from split(facts, token_ids, loss_mask, max_length=self.max_length, over_long=self.over_long)

    def _as_stored(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        assert self.stored is not None
        if self._unusable is not None and self.stored.has_media(columns):
            raise self._unusable
        yield self.stored.sequence(
            number,
            columns,
            max_length=self.max_length,
            max_images=self._max_images,
            placeholder=self._placeholder_id,
        )

    def _prompted(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        chat = self._chat(columns, answered=False)
        if chat is None:
            used: tuple[str, ...] = self._text_columns
            token_ids = self._tokens(columns)
        else:
            self._layouts[chat.layout] += 1
            chat = self._whole(self.template.fitted(chat, prompted=True))
            token_ids, used = self.template.prompt(chat), chat.columns
        positions = self._placeholders(token_ids, chat)
        facts = facts_of(number, columns, self.source, used=used)
        if len(token_ids) < self.max_length:
            facts = facts._replace(media=self._media(chat, positions))
        yield prompt(facts, token_ids, max_length=self.max_length)

    def _isolated(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        facts, token_ids = self._document(number, columns)
        loss_mask = [True] * len(token_ids)
        yield from split(facts, token_ids, loss_mask, max_length=self.max_length, over_long=self.over_long)

    def _document(self, number: int, columns: Columns) -> Document:
        facts = facts_of(number, columns, self.source, used=self._text_columns)
        token_ids, end = self._tokens(columns), self.tokenizer.eos_token_id
        self._placeholders(token_ids, None)
        has_end = end is None or token_ids[-1:] == [end]  # some tokenizers append it themselves
        return Document(facts, token_ids if has_end else [*token_ids, end])

    def _document_or_reject(self, row: SourceRow) -> Document | Reject:
        try:
            return self._document(row.number, _columns_of(row))
        except RowUnusable as unusable:
            return self._reject(row, unusable)

    # Images

    @cached_property
    def _text_columns(self) -> tuple[str, ...]:
        """The columns of a row without a chat that are no metadata."""
        return (self.source.text, *(image_columns(self.source) if self.processor else ()))

    @cached_property
    def _image_tokens(self) -> tuple[str, ...]:
        """The special tokens that stand for images and videos, which no text may hold."""
        processor = self.processor
        ids = {self._placeholder_id, *processor.image_token_ids, *processor.video_token_ids} if processor else set()
        return tuple(str(self.tokenizer.convert_ids_to_tokens(id_)) for id_ in sorted(filter(None, ids)))

    def _chat(self, columns: Columns, *, answered: bool) -> Conversation | None:
        """The chat of a row, with its images if the teacher sees any. Raises `RowUnusable`, `ProcessorUnusable`."""
        sees = self.processor is not None or self._unusable is not None
        chat = conversation_of(columns, self.source, answered=answered, with_images=sees)
        if chat is None:
            return None
        if not sees:
            if has_marks(chat) and any(columns.get(name) for name in image_columns(self.source)):
                raise RowUnusable(RejectReason.BAD_IMAGES, "the row has images, and the teacher reads text only")
            return chat
        chat = with_images(chat, columns, self.source)
        if self._unusable is not None:
            if chat.images:
                raise self._unusable
            return chat
        if len(chat.images) > self._max_images:
            detail = f"{len(chat.images)} images, at most {self._max_images}"
            raise RowUnusable(RejectReason.TOO_MANY_IMAGES, detail)
        for text in texts_of([chat.messages, chat.tools]):
            self._require_no_image_token(text)
        return chat

    def _require_no_image_token(self, text: str) -> None:
        token = next((token for token in self._image_tokens if token in text), None)
        if token is not None:
            detail = f"a text holds {token}, which the teacher reads as part of an image"
            raise RowUnusable(RejectReason.PLACEHOLDERS_DIFFER, detail)

    def _placeholders(self, token_ids: list[int], chat: Conversation | None) -> list[int]:
        """Indices of the images' placeholders in a row. Raises `RowUnusable` unless there is one for each image."""
        if self.processor is None:
            return []
        positions = [index for index, id_ in enumerate(token_ids) if id_ == self._placeholder_id]
        images = len(chat.images) if chat else 0
        if len(positions) != images:
            detail = f"{len(positions)} placeholders {self.template.placeholder} for {images} images"
            raise RowUnusable(RejectReason.PLACEHOLDERS_DIFFER, detail)
        return positions

    def _media(self, chat: Conversation | None, positions: list[int]) -> tuple[MediaReference, ...]:
        """The images of a row with their content. Raises `RowUnusable`, `StorageFailed`, `ImageHostFailed`."""
        return self._images.read(chat.images, positions) if chat and self._images else ()

    def _tokens(self, columns: Columns) -> list[int]:
        """Token ids of a row's text, with the special tokens that the tokenizer adds."""
        text = columns.get(self.source.text)
        if self.processor is not None and column_images(columns, self.source):
            raise RowUnusable(RejectReason.BAD_IMAGES, "images are captured in chats only")
        if not isinstance(text, str) or not text:
            pretrain = self._mode == "pretrain"
            names = [self.source.text] if pretrain else [self.source.messages, self.source.prompt]
            looked_in = [*map(repr, dict.fromkeys([*names, self.source.text]))]
            found = (
                f"neither {' nor '.join(looked_in)} holds text" if looked_in[1:] else f"{looked_in[0]} holds no text"
            )
            reason = RejectReason.NO_TEXT if pretrain else RejectReason.NO_MESSAGES
            raise RowUnusable(reason, found)
        self._require_no_image_token(text)
        return list(self.tokenizer(text)["input_ids"])

    def _reject(self, row: SourceRow, why: RowUnusable) -> Reject:
        sample_id = sample_id_of(row.number, row.columns or {}, self.source)
        return Reject(row.number, sample_id, why.reason, why.detail)


def template_date_of(header: DatasetHeader) -> date | None:
    """The date that a dataset's chat template gets. Datasets of format 1 have none: their templates read the clock."""
    stored = header.about.template_date
    return date.fromisoformat(stored) if stored else None


def _processor_of(teacher: TeacherConfig, header: DatasetHeader | None) -> Any | ProcessorUnusable | None:
    """The processor of a new dataset's teacher, or why it cannot be loaded: text needs none. That of a started dataset
    is the one that its header names."""
    if header is not None:
        return load_teacher_processor(teacher) if header.about.processor else None
    try:
        return load_teacher_processor(teacher)
    except ProcessorUnusable as error:
        return error


def _columns_of(row: SourceRow) -> Columns:
    if row.columns is None:
        reason = row.reason
        raise RowUnusable(reason, row.problem)
    if row.is_dropped:
        raise RowUnusable(RejectReason.ADAPTER_DROPPED, "source.adapter returned nothing for the row")
    return row.columns
