"""From a source row to a token sequence: ONE call of the chat template gives the ids and the loss mask.

A row in; a `TokenSequence`, or a `Reject` with a named reason, out. The mask over tokens becomes target spans in
`storage_schema.rows.spans_from_mask`, the one place where anything is shifted.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.config import SourceConfig
from pipeline.errors import SourceNotFound, TemplateCannotMark
from pipeline.sequences import TokenSequence
from storage_schema.commits import Reject
from storage_schema.rows import spans_from_mask

from .readers import SourceRow

# The tag by which a template marks the assistant's tokens; the same test as in transformers' own tokenizer code.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class SequenceMaker:
    """Makes token sequences from the rows of one source with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, source: SourceConfig, max_length: int):
        self.tokenizer, self.source, self.max_length = tokenizer, source, max_length
        self.template: str | None = _template(tokenizer, source)

    @property
    def template_sha256(self) -> str | None:
        """Digest of the chat template in use."""
        return hashlib.sha256(self.template.encode()).hexdigest() if self.template else None

    def make(self, row: SourceRow) -> TokenSequence | Reject:
        """The sequence of a row, or why there is none. Raises `TemplateCannotMark` for the first chat row where the
        template is missing or has no generation marks."""
        columns = row.columns or {}
        sample_id = str(columns.get(self.source.id) or f"row-{row.number:09d}")

        def reject(reason: str, detail: str) -> Reject:
            return Reject(row.number, sample_id, reason, detail)

        if row.columns is None:
            return reject("not_json", row.problem)
        messages, text = columns.get(self.source.messages), columns.get(self.source.text)
        if messages:
            problem = _problem_of(messages)
            if problem:
                return reject("bad_messages", problem)
            self._require_marks()
            try:
                token_ids, learned = self._chat(messages, columns.get("tools"))
            except Exception as error:  # a template is a program of its own and may raise anything
                return reject("template_failed", f"{type(error).__name__}: {error}")
        elif isinstance(text, str) and text:
            token_ids = self.tokenizer(text)["input_ids"]
            learned = [True] * len(token_ids)
        else:
            return reject("no_messages", f"neither {self.source.messages!r} nor {self.source.text!r} holds anything")
        if len(token_ids) > self.max_length:
            if self.source.over_long == "reject":
                return reject("over_long", f"{len(token_ids)} tokens, at most {self.max_length}")
            token_ids, learned = token_ids[: self.max_length], learned[: self.max_length]
        spans = spans_from_mask(learned)
        if not len(spans):
            return reject("no_targets", f"none of its {len(token_ids)} tokens is to be learned")
        used = (self.source.messages, self.source.text, self.source.id)
        metadata = {name: _plain(value) for name, value in columns.items() if name not in used}
        return TokenSequence(
            sample_id=sample_id,
            source_row=row.number,
            token_ids=np.array(token_ids, np.int32),
            target_spans=spans,
            metadata=metadata,
        )

    def _chat(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
        marked = self.source.loss_on != "all"
        encoded = self.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marked,
        )
        token_ids = list(encoded["input_ids"])
        learned = [bool(bit) for bit in encoded["assistant_masks"]] if marked else [True] * len(token_ids)
        return token_ids, _last_turn(learned) if self.source.loss_on == "last_turn" else learned

    def _require_marks(self) -> None:
        where = self.source.chat_template or f"chat template of {self.tokenizer.name_or_path}"
        if not self.template:
            raise TemplateCannotMark(
                where, found="no chat template", wanted="one", fix="set source.chat_template to a Jinja file"
            )
        if self.source.loss_on != "all" and not _GENERATION_TAG.search(self.template):
            raise TemplateCannotMark(
                where,
                found="no {% generation %} marks",
                wanted=f"marks round the assistant's tokens, because source.loss_on is {self.source.loss_on}",
                fix="set source.chat_template to a copy with marks (see examples/), or source.loss_on to all",
            )


def _template(tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> str | None:
    if source.chat_template is None:
        return tokenizer.chat_template
    try:
        return Path(source.chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise SourceNotFound(
            source.chat_template, found=error.strerror, wanted="a Jinja chat template", fix="check source.chat_template"
        ) from None


def _problem_of(messages: object) -> str:
    if not isinstance(messages, list):
        return f"messages are {type(messages).__name__}, not a list"
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            return f"message {index} has no role"
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return f"content of message {index} is {type(content).__name__}, neither text nor parts"
    return ""


def _last_turn(learned: list[bool]) -> list[bool]:
    """Only the last run of learned tokens."""
    stop = len(learned) - learned[::-1].index(True) if True in learned else 0
    start = stop
    while start and learned[start - 1]:
        start -= 1
    return [start <= index < stop for index in range(len(learned))]


def _plain(value: object) -> object:
    """Metadata is JSON: what JSON cannot say (dates, bytes) is stored as text."""
    return json.loads(json.dumps(value, default=str))
