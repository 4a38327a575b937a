"""Makes token sequences from source rows: tokenizes, splits, joins documents, rejects unusable rows.

For each row: a `TokenSequence`, several if the row is split, a prompt without targets in mode generate, or a `Reject`
with a reason. The loss mask over tokens becomes target spans in `storage_schema.rows.spans_from_mask`, the only place
where anything is shifted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from coldstill.pipeline.config import CaptureConfig, SourceConfig
from coldstill.pipeline.errors import TeacherUnusable, TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.checkpoint import end_token_ids, load_tokenizer
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import spans_from_mask
from coldstill.storage_schema.shard.layout import MAX_METADATA_BYTES

from .chat_template import ChatTemplate, Fitted
from .conversation import Conversation, RowUnusable, conversation_of
from .files import SourceRow
from .loss_mask import LossMask

Mode = Literal["score", "generate", "pretrain"]
OverLong = Literal["reject", "cut", "split"]
Columns = dict[str, Any]
_MAX_LOST = 3
"""Maximum number of dropped parts that a reject names."""
_ROOM_FOR_ID = 64
"""Bytes that engines and splitting may append to a sample id."""


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
    ):
        """`stops`: tokens at which the teacher stops, besides the tokenizer's end of sequence."""
        self.tokenizer, self.source, self.max_length = tokenizer, source, max_length
        self.template = ChatTemplate(tokenizer, source, today=today)
        self._loss_mask = LossMask(self.template, source.loss_on, stops)
        self._mode, self._documents = mode, documents
        self._layouts: Counter[str] = Counter()
        self._made: Callable[[int, Columns], Iterator[TokenSequence | Reject]] = {
            "score": self._scored,
            "generate": self._prompted,
            "pretrain": self._isolated,
        }[mode]
        if mode == "pretrain" and documents == "concat" and tokenizer.eos_token_id is None:
            raise TeacherUnusable(
                tokenizer.name_or_path,
                found="a tokenizer without an end-of-sequence token",
                wanted="one, to separate documents",
                fix="set documents to isolate",
            )

    @classmethod
    def of(
        cls, config: CaptureConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, today: date | None = None
    ) -> SequenceMaker:
        """The maker of a capture. Raises `TeacherUnusable` for a tokenizer that cannot be loaded.

        `today`: the date that the dataset's header gives to the chat template.
        """
        tokenizer = tokenizer or load_tokenizer(config.teacher)
        return cls(
            tokenizer,
            source=config.source,
            max_length=config.teacher.max_length,
            mode=config.mode,
            documents=config.documents,
            stops=end_token_ids(config.teacher, tokenizer),
            today=today,
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
            yield from _joined(map(self._document_or_reject, rows), max_length=self.max_length)
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
        chat = conversation_of(columns, self.source, answered=True)
        if chat is None:
            used: tuple[str, ...] = (self.source.text,)
            token_ids = self._tokens(columns)
            loss_mask = [True] * len(token_ids)
        else:
            used = chat.columns
            self._layouts[chat.layout] += 1
            learned = chat.learned_reasoning(last_turn=self.source.loss_on == "last_turn")
            chat = self._whole(self.template.fitted(chat, learned=learned))
            token_ids, loss_mask = self._loss_mask.ids_and_loss_mask(chat)
        facts = _facts_of(number, columns, self.source, used=used)
        yield from _split(facts, token_ids, loss_mask, max_length=self.max_length, over_long=self.over_long)

    def _prompted(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        chat = conversation_of(columns, self.source, answered=False)
        if chat is None:
            used: tuple[str, ...] = (self.source.text,)
            token_ids = self._tokens(columns)
        else:
            self._layouts[chat.layout] += 1
            chat = self._whole(self.template.fitted(chat, prompted=True))
            token_ids, used = self.template.prompt(chat), chat.columns
        facts = _facts_of(number, columns, self.source, used=used)
        yield _prompt(facts, token_ids, max_length=self.max_length)

    def _isolated(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        facts, token_ids = self._document(number, columns)
        loss_mask = [True] * len(token_ids)
        yield from _split(facts, token_ids, loss_mask, max_length=self.max_length, over_long=self.over_long)

    def _document(self, number: int, columns: Columns) -> _Document:
        facts = _facts_of(number, columns, self.source, used=(self.source.text,))
        token_ids, end = self._tokens(columns), self.tokenizer.eos_token_id
        has_end = end is None or token_ids[-1:] == [end]  # some tokenizers append it themselves
        return _Document(facts, token_ids if has_end else [*token_ids, end])

    def _document_or_reject(self, row: SourceRow) -> _Document | Reject:
        try:
            return self._document(row.number, _columns_of(row))
        except RowUnusable as unusable:
            return self._reject(row, unusable)

    def _tokens(self, columns: Columns) -> list[int]:
        """Token ids of a row's text, with the special tokens that the tokenizer adds."""
        text = columns.get(self.source.text)
        if not isinstance(text, str) or not text:
            pretrain = self._mode == "pretrain"
            names = [self.source.text] if pretrain else [self.source.messages, self.source.prompt]
            looked_in = [*map(repr, dict.fromkeys([*names, self.source.text]))]
            found = (
                f"neither {' nor '.join(looked_in)} holds text" if looked_in[1:] else f"{looked_in[0]} holds no text"
            )
            reason = RejectReason.NO_TEXT if pretrain else RejectReason.NO_MESSAGES
            raise RowUnusable(reason, found)
        return list(self.tokenizer(text)["input_ids"])

    def _reject(self, row: SourceRow, why: RowUnusable) -> Reject:
        sample_id = sample_id_of(row.number, row.columns or {}, self.source)
        return Reject(row.number, sample_id, why.reason, why.detail)


class _RowFacts(NamedTuple):
    """What all sequences of a row share."""

    number: int
    sample_id: str
    metadata: Mapping[str, Any]

    def reject(self, reason: RejectReason, detail: str, *, sample_id: str = "") -> Reject:
        """The row, or one of its parts, as a reject."""
        return Reject(self.number, sample_id or self.sample_id, reason, detail)


class _Document(NamedTuple):
    """A row's text as tokens, with the end-of-sequence token.

    The end token teaches the student where texts end; in joined rows it is the separator.
    """

    facts: _RowFacts
    token_ids: list[int]


def template_date_of(header: DatasetHeader) -> date | None:
    """The date that a dataset's chat template gets. Datasets of format 1 have none: their templates read the clock."""
    stored = header.about.template_date
    return date.fromisoformat(stored) if stored else None


def _columns_of(row: SourceRow) -> Columns:
    if row.columns is None:
        reason = row.reason
        raise RowUnusable(reason, row.problem)
    if row.is_dropped:
        raise RowUnusable(RejectReason.ADAPTER_DROPPED, "source.adapter returned nothing for the row")
    return row.columns


def sample_id_of(number: int, columns: Mapping[str, Any], source: SourceConfig) -> str:
    """A row's own id, or one made of its number."""
    given = columns.get(source.id)
    if given is None or given == "":
        return f"row-{number:09d}"
    return f"{given}#{number}" if source.duplicate_ids == "number" else str(given)


def _facts_of(number: int, columns: Mapping[str, Any], source: SourceConfig, *, used: Sequence[str]) -> _RowFacts:
    """Sample id and metadata of a row: all columns except those that were `used` for its tokens.

    Raises `RowUnusable` if they are larger than a shard may store.
    """
    sample_id = sample_id_of(number, columns, source)
    metadata = {name: _as_json(value) for name, value in columns.items() if name not in (*used, source.id)}
    size = len(sample_id.encode()) + len(json.dumps(metadata, ensure_ascii=False).encode()) + _ROOM_FOR_ID
    if size > MAX_METADATA_BYTES:
        detail = f"{size:,} bytes in other columns than the text, at most {MAX_METADATA_BYTES:,}"
        raise RowUnusable(RejectReason.METADATA_TOO_LARGE, detail)
    return _RowFacts(number, sample_id, metadata)


def _as_json(value: object) -> object:
    """Metadata is JSON: values that JSON cannot hold (dates, bytes) become strings."""
    return json.loads(json.dumps(value, default=str))


def _split(
    facts: _RowFacts, token_ids: Sequence[int], loss_mask: Sequence[bool], *, max_length: int, over_long: OverLong
) -> Iterator[TokenSequence | Reject]:
    """The sequence of a row, or its parts `ID~0`, `ID~1`, ..., which end to end are the row."""
    if len(token_ids) <= max_length or over_long == "cut":
        yield _part(facts, facts.sample_id, token_ids[:max_length], loss_mask[:max_length])
    elif over_long == "reject":
        yield facts.reject(RejectReason.OVER_LONG, f"{len(token_ids)} tokens, at most {max_length}")
    else:
        for number, start in enumerate(range(0, len(token_ids), max_length)):
            part = slice(start, start + max_length)
            yield _part(facts, f"{facts.sample_id}~{number}", token_ids[part], loss_mask[part])


def _part(
    facts: _RowFacts, sample_id: str, token_ids: Sequence[int], loss_mask: Sequence[bool]
) -> TokenSequence | Reject:
    spans = spans_from_mask(loss_mask)
    if not len(spans):
        detail = f"none of its {len(token_ids)} tokens is a target"
        return facts.reject(RejectReason.NO_TARGETS, detail, sample_id=sample_id)
    return _sequence(facts, sample_id, token_ids, spans)


def _prompt(facts: _RowFacts, token_ids: Sequence[int], *, max_length: int) -> TokenSequence | Reject:
    """A prompt for the teacher to answer."""
    if not token_ids:
        return facts.reject(RejectReason.NO_PROMPT, "no token before the answer")
    if len(token_ids) >= max_length:
        detail = f"{len(token_ids)} tokens of prompt leave no room below {max_length}"
        return facts.reject(RejectReason.NO_ROOM, detail)
    return _sequence(facts, facts.sample_id, token_ids, np.empty((0, 2), np.int32))


def _sequence(facts: _RowFacts, sample_id: str, token_ids: Sequence[int], spans: np.ndarray) -> TokenSequence:
    return TokenSequence(
        sample_id=sample_id,
        source_row=facts.number,
        token_ids=np.array(token_ids, np.int32),
        target_spans=spans,
        metadata=facts.metadata,
    )


def _joined(documents: Iterable[_Document | Reject], *, max_length: int) -> Iterator[TokenSequence | Reject]:
    """Documents end to end, cut into rows of `max_length` tokens; the last row may be shorter. Every token is a target.

    A row is named `ID@TOKEN` after the document in which it begins and the index of the token there. Its metadata is
    `source_rows`, the documents in it; the documents' own columns are not kept. Rejects are passed through.
    """
    row: list[int] = []
    name, first, rows = "", 0, list[int]()
    facts = None
    for document in documents:
        if isinstance(document, Reject):
            yield document
            continue
        facts, start = document.facts, 0
        while start < len(document.token_ids):
            if not row:
                name, first, rows = f"{facts.sample_id}@{start}", facts.number, []
            taken = document.token_ids[start : start + max_length - len(row)]
            row += taken
            rows.append(facts.number)
            start += len(taken)
            if len(row) == max_length:
                yield _joined_row(name, first, rows, row)
                row = []
    if len(row) > 1:
        yield _joined_row(name, first, rows, row)
    elif row and facts:
        yield facts.reject(RejectReason.NO_TARGETS, "one token is left at the end of its unit", sample_id=name)


def _joined_row(name: str, first: int, rows: list[int], token_ids: list[int]) -> TokenSequence:
    return TokenSequence(
        sample_id=name,
        source_row=first,
        token_ids=np.array(token_ids, np.int32),
        target_spans=np.array([[0, len(token_ids) - 1]], np.int32),
        metadata={"source_rows": rows},
    )
