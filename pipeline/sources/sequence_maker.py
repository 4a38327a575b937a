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

import numpy as np
from transformers import PreTrainedTokenizerBase

from coldstill.common.processor import ProcessorUnusable
from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable, TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.score_ids import BadScoreIds, read_score_ids
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.teachers.checkpoint import (
    end_token_ids,
    load_teacher_processor,
    load_tokenizer,
    with_read_length,
)
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import TeacherPrompt

from .chat_template import ChatTemplate
from .conversation import Conversation, RowUnusable, conversation_of
from .dataset_rows import StoredSequences
from .files import SourceRow
from .image_parts import RowImages, column_images, image_columns
from .image_reader import ImageReader
from .loss_mask import ChatSide
from .sequences import Document, OverLong, facts_of, joined, prompt, sample_id_of, split, storable
from .teacher_prompt import PromptRule

Mode = Literal["score", "generate", "pretrain"]
Columns = dict[str, Any]


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
        max_read_length: int | None = None,
        max_images: int = TeacherConfig.model_fields["max_images"].default,
        stored: StoredSequences | None = None,
        top_k: int = TeacherConfig.model_fields["top_k"].default,
    ):
        """`stops`: tokens at which the teacher stops, besides the tokenizer's end of sequence. `processor`: that of a
        teacher that sees images, or why it cannot be loaded, which the first row with an image raises; `max_images` of
        a row. `stored`: the rows are those of a dataset, scored as they are. `top_k`: K, which bounds the
        targets of a row."""
        self.stored = stored
        self.tokenizer, self.source, self.max_length = tokenizer, source, max_length
        read = None if processor is None else ImageReader(source).read
        self._images = RowImages(tokenizer, source, processor, most=max_images, read=read)
        self.processor: Any | None = self._images.processor
        self._width = top_k + (source.max_score_ids if source.score_ids else 0)
        self.template = ChatTemplate(tokenizer, source, today=today, processor=self.processor)
        stops = frozenset(stops)
        self._student = ChatSide(self.template, loss_on=source.loss_on, stops=stops)
        self._rule: PromptRule | None = None
        if source.teacher_prompt_rule:
            template = self.template.changed(arguments=source.teacher_template_arguments)
            side = ChatSide(template, loss_on=source.loss_on, stops=stops)
            self._rule = PromptRule(source, side, max_read_length=max_read_length or max_length)
        self._teacher_columns = self._rule.columns if self._rule else ()
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
        config = with_read_length(config)
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
            max_read_length=config.teacher.max_read_length,
            max_images=config.teacher.max_images,
            stored=StoredSequences(config.source.rows_of, tokenizer, writer_round=config.source.round or None)
            if config.source.rows_of is not None
            else None,
            top_k=config.teacher.top_k,
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
    def teacher_prompt(self) -> TeacherPrompt | None:
        """How the teacher's prompt is made, if it reads another one than the row's."""
        return self._rule.facts if self._rule else None

    @property
    def end_token_ids(self) -> tuple[int, ...] | None:
        """Tokens that end an answer of the teacher, in every mode and engine; None in mode pretrain."""
        return None if self._mode == "pretrain" else self._student.end_token_ids

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
            documents = map(self._document_or_reject, rows)
            yield from storable(joined(documents, max_length=self.max_length), width=self._width)
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
            made = list(self._storable(row))
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

    def _of_row(self, row: SourceRow) -> Iterator[TokenSequence | Reject]:
        try:
            yield from self._storable(row)
        except RowUnusable as unusable:
            yield self._reject(row, unusable)

    def _storable(self, row: SourceRow) -> Iterator[TokenSequence | Reject]:
        return storable(self._made(row.number, _columns_of(row)), width=self._width)

    def _scored(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        chat = self._chat(columns, answered=True)
        if chat is None:
            used: tuple[str, ...] = self._text_columns
            token_ids = self._tokens(columns)
            loss_mask = [True] * len(token_ids)
        else:
            used = chat.columns
            self._layouts[chat.layout] += 1
            most = self.max_length if self.over_long == "reject" else None
            # Named ids are given for all targets of the row, also for those that are cut off.
            until = self.max_length if self.over_long == "cut" and self.source.score_ids is None else None
            chat, token_ids, mask = self._student.rendered(chat, answered=True, most=most, until=until)
            loss_mask = mask or []
        positions = self._images.placeholders(token_ids, chat)
        for position in positions:  # a teacher predicts text only
            loss_mask[position] = False
        named = self.source.score_ids
        used = (*used, *self._teacher_columns, *([named] if named else []))
        facts = facts_of(number, columns, self.source, used=used)
        if named is not None:
            facts = facts._replace(score_ids=self._score_ids(columns.get(named), sum(loss_mask[1:])))
        if len(token_ids) <= self.max_length or self.over_long != "reject":
            facts = facts._replace(media=self._images.media(chat, positions))
        for row in split(facts, token_ids, loss_mask, max_length=self.max_length, over_long=self.over_long):
            yield self._as_read(row, chat, columns)

    def _as_stored(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        assert self.stored is not None
        if self.stored.has_media(columns):
            self._images.require_processor()
        yield self.stored.sequence(
            number,
            columns,
            max_length=self.max_length,
            max_images=self._images.most,
            placeholder=self._images.placeholder_id,
        )

    def _score_ids(self, value: object, targets: int) -> np.ndarray:
        """The ids that the row names for its `targets`. Raises `RowUnusable`."""
        most, width = self.source.max_score_ids, self._width
        try:
            return read_score_ids(value, targets=targets, token_count=self._token_count, most=most, width=width)
        except BadScoreIds as error:
            raise RowUnusable(RejectReason.BAD_SCORE_IDS, f"column {self.source.score_ids}: {error}") from None

    @cached_property
    def _token_count(self) -> int:
        """The highest id that the tokenizer can produce, plus one."""
        return 1 + max(self.tokenizer.get_vocab().values())

    def _prompted(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        chat = self._chat(columns, answered=False)
        if chat is None:
            used: tuple[str, ...] = self._text_columns
            token_ids = self._tokens(columns)
        else:
            self._layouts[chat.layout] += 1
            used = chat.columns
            chat, token_ids, _ = self._student.rendered(chat, answered=False)
        positions = self._images.placeholders(token_ids, chat)
        facts = facts_of(number, columns, self.source, used=(*used, *self._teacher_columns))
        if len(token_ids) < self.max_length:
            facts = facts._replace(media=self._images.media(chat, positions))
        yield self._as_read(prompt(facts, token_ids, max_length=self.max_length), chat, columns)

    def _as_read(
        self, row: TokenSequence | Reject, chat: Conversation | None, columns: Columns
    ) -> TokenSequence | Reject:
        """What the teacher reads for a row with this `chat`. Raises `RowUnusable`, whose detail names the side."""
        if self._rule is None or isinstance(row, Reject):
            return row
        answered = self._mode == "score"
        try:
            theirs = self._images.seen(
                self._rule.chat(columns, answered=answered, with_images=self._images.sees), columns
            )
            if chat is not None and theirs.images != chat.images:
                raise RowUnusable(RejectReason.BAD_IMAGES, f"{len(theirs.images)} images, and the row has others")
            most = self._rule.max_read_length
            theirs, token_ids, loss_mask = self._rule.side.rendered(theirs, answered=answered, most=most)
            return self._rule.read(row, token_ids, loss_mask, self._images.placeholders(token_ids, theirs))
        except RowUnusable as why:
            reason = RejectReason.TEACHER_OVER_LONG if why.reason is RejectReason.OVER_LONG else why.reason
            raise RowUnusable(reason, f"as the teacher reads it: {why.detail}", lost=why.lost) from None

    def _isolated(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        facts, token_ids = self._document(number, columns)
        loss_mask = [True] * len(token_ids)
        yield from split(facts, token_ids, loss_mask, max_length=self.max_length, over_long=self.over_long)

    def _document(self, number: int, columns: Columns) -> Document:
        facts = facts_of(number, columns, self.source, used=self._text_columns)
        token_ids, end = self._tokens(columns), self.tokenizer.eos_token_id
        self._images.placeholders(token_ids, None)
        has_end = end is None or token_ids[-1:] == [end]  # some tokenizers append it themselves
        return Document(facts, token_ids if has_end else [*token_ids, end])

    def _document_or_reject(self, row: SourceRow) -> Document | Reject:
        try:
            return self._document(row.number, _columns_of(row))
        except RowUnusable as unusable:
            return self._reject(row, unusable)

    def _chat(self, columns: Columns, *, answered: bool) -> Conversation | None:
        """The chat of a row, with its images if the teacher sees any. Raises `RowUnusable`, `ProcessorUnusable`."""
        chat = conversation_of(columns, self.source, answered=answered, with_images=self._images.sees)
        return None if chat is None else self._images.seen(chat, columns)

    @cached_property
    def _text_columns(self) -> tuple[str, ...]:
        """The columns of a row without a chat that are no metadata."""
        return (self.source.text, *(image_columns(self.source) if self.processor else ()))

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
        self._images.require_no_image_token(text)
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
