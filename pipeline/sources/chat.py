"""From source rows to token sequences: ONE call of the chat template gives the ids and the loss mask.

The rows of a unit in; for each a `TokenSequence` (several where it is split, prompts in mode generate), or a `Reject`
with a named reason, out. The mask over tokens becomes target spans in `storage_schema.rows.spans_from_mask`, the one
place where anything is shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from coldstill.pipeline.config import CaptureConfig, SourceConfig
from coldstill.pipeline.errors import TeacherUnusable, TemplateCannotMark
from coldstill.pipeline.sequences import TokenSequence
from coldstill.pipeline.tokenizer import load_tokenizer
from coldstill.storage_schema.commits import Reject

from .conversations import RowUnusable, conversation_of
from .documents import Document, isolated, joined
from .pieces import OverLong, facts_of, pieces_of, prompt_of, sample_id_of
from .rows import SourceRow
from .template import ChatTemplate

Mode = Literal["score", "generate", "pretrain"]
Columns = dict[str, Any]


class SequenceMaker:
    """Makes token sequences from the rows of one source with one tokenizer. Not for two threads at once: the
    tokenizer is not."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: SourceConfig,
        max_length: int,
        mode: Mode = "score",
        documents: Literal["isolate", "concat"] = "isolate",
    ):
        self.tokenizer, self.source, self.max_length = tokenizer, source, max_length
        self.template = ChatTemplate(tokenizer, source)
        self._mode, self._documents = mode, documents
        self._made: Callable[[int, Columns], Iterator[TokenSequence | Reject]] = {
            "score": self._scored,
            "generate": self._prompted,
            "pretrain": self._isolated,
        }[mode]
        if mode == "pretrain" and documents == "concat" and tokenizer.eos_token_id is None:
            raise TeacherUnusable(
                tokenizer.name_or_path,
                found="a tokenizer without an end-of-sequence token",
                wanted="one, to stand between documents",
                fix="set documents to isolate",
            )

    @classmethod
    def of(cls, config: CaptureConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> SequenceMaker:
        """The maker of a capture. Raises `TeacherUnusable` for a tokenizer that cannot be loaded."""
        return cls(
            tokenizer or load_tokenizer(config.teacher),
            source=config.source,
            max_length=config.teacher.max_length,
            mode=config.mode,
            documents=config.documents,
        )

    @property
    def template_sha256(self) -> str | None:
        """Digest of the chat template in use and of its arguments; none where raw text is read."""
        return None if self._mode == "pretrain" else self.template.sha256

    @property
    def over_long(self) -> OverLong:
        """What becomes of rows that are too long: documents are cut unless they are split, prompts never."""
        if self._mode == "generate":
            return "reject"
        if self._mode == "pretrain":
            return "split" if self._documents == "concat" or self.source.over_long == "split" else "cut"
        return self.source.over_long

    def sequences(self, rows: Iterable[SourceRow]) -> Iterator[TokenSequence | Reject]:
        """What the rows of one unit become, in their order. A row whose mask the template cannot give is a reject:
        `check` has told apart beforehand a template that cannot do it at all."""
        if self._mode == "pretrain" and self._documents == "concat":
            yield from joined(map(self._document_or_reject, rows), max_length=self.max_length)
            return
        for row in rows:
            try:
                yield from self._of_row(row)
            except TemplateCannotMark as error:
                yield self._reject(row, RowUnusable("template_cannot_mark", str(error.found)))

    def make(self, row: SourceRow) -> TokenSequence | Reject:
        """The first sequence of a row, or why there is none. Raises `TemplateCannotMark`."""
        return next(self._of_row(row))

    def check(self, rows: Iterable[SourceRow]) -> None:
        """Raise `TemplateCannotMark` where the template is missing, or cannot mark the assistant's tokens of one of
        these rows: the first of the source, before anything is started."""
        for row in rows:
            for _ in self._of_row(row):
                pass

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
            learned = [True] * len(token_ids)
        else:
            used = chat.columns
            token_ids, learned = self.template.learned(chat)
        facts = facts_of(number, columns, id_column=self.source.id, used=used)
        yield from pieces_of(facts, token_ids, learned, max_length=self.max_length, over_long=self.over_long)

    def _prompted(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        chat = conversation_of(columns, self.source, answered=False)
        token_ids = self._tokens(columns) if chat is None else self.template.prompt(chat)
        used = (self.source.text,) if chat is None else chat.columns
        facts = facts_of(number, columns, id_column=self.source.id, used=used)
        yield prompt_of(facts, token_ids, max_length=self.max_length)

    def _isolated(self, number: int, columns: Columns) -> Iterator[TokenSequence | Reject]:
        yield from isolated(self._document(number, columns), max_length=self.max_length, over_long=self.over_long)

    def _document(self, number: int, columns: Columns) -> Document:
        facts = facts_of(number, columns, id_column=self.source.id, used=(self.source.text,))
        token_ids, end = self._tokens(columns), self.tokenizer.eos_token_id
        has_end = end is None or token_ids[-1:] == [end]  # some tokenizers append it themselves
        return Document(facts, token_ids if has_end else [*token_ids, end])

    def _document_or_reject(self, row: SourceRow) -> Document | Reject:
        try:
            return self._document(row.number, _columns_of(row))
        except RowUnusable as unusable:
            return self._reject(row, unusable)

    def _tokens(self, columns: Columns) -> list[int]:
        """Token ids of a row's text, as the tokenizer begins and ends a text of its own."""
        text = columns.get(self.source.text)
        if not isinstance(text, str) or not text:
            names = [self.source.text] if self._mode == "pretrain" else [self.source.messages, self.source.prompt]
            wanted = " nor ".join(map(repr, dict.fromkeys([*names, self.source.text])))
            raise RowUnusable("no_text" if self._mode == "pretrain" else "no_messages", f"{wanted} holds no text")
        return list(self.tokenizer(text)["input_ids"])

    def _reject(self, row: SourceRow, why: RowUnusable) -> Reject:
        sample_id = sample_id_of(row.number, row.columns or {}, id_column=self.source.id)
        return Reject(row.number, sample_id, why.reason, why.detail)


def _columns_of(row: SourceRow) -> Columns:
    if row.columns is None:
        raise RowUnusable("not_json", row.problem)
    return row.columns
