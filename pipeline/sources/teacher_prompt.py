"""Makes the chat that the teacher reads where that is not the row's, and checks that both have the same targets.

The settings give the teacher another system message, another prompt, a whole chat, or other variables of the chat
template. Only what precedes an answer may differ: the target spans of both sides must be as many, as long, and have the
same labels. Otherwise the row is rejected, because its targets would be distributions of other tokens.

Shape letters: `T` tokens of the row, `E` tokens that the teacher reads, `n` spans.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coldstill.pipeline.errors import TemplateDrops
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.teachers.protocol import StoredRow, TokenSequence
from coldstill.storage_schema.header_facts import TeacherPrompt
from coldstill.storage_schema.rows import MediaReference, spans_from_mask

from .conversation import Conversation, RowUnusable, conversation_of, turns_of
from .loss_mask import ChatSide

_KINDS = {
    "teacher_system": "system",
    "teacher_prompt": "prompt",
    "teacher_messages": "messages",
    "teacher_template_arguments": "arguments",
}
"""Names of the keys in the header; several are joined by `+`."""


class PromptRule:
    """How the settings make the chat that the teacher reads."""

    def __init__(self, source: SourceConfig, side: ChatSide, *, max_read_length: int):
        """`side`: renders chats with the template's variables for the teacher.

        Raises `TemplateDrops` for a variable that the template does not read: the teacher would see nothing of it.
        """
        self._source, self.side, self.max_read_length = source, side, max_read_length
        template = side.template
        ignored = [name for name in source.teacher_template_arguments if not _mentions(template.text, name)]
        if ignored:
            raise TemplateDrops(
                template.name,
                found=f"no variable {', '.join(ignored)}",
                wanted="a template that reads all of source.teacher_template_arguments",
                fix="correct the name, or remove it from source.teacher_template_arguments",
            )
        self.columns = tuple(filter(None, (source.teacher_prompt, source.teacher_messages)))
        """Columns that are read; they are no metadata of the row."""

    @property
    def facts(self) -> TeacherPrompt:
        """The header's `teacher_prompt`: the digest is that of the keys and their values as JSON."""
        rule = self._source.teacher_prompt_rule
        text = json.dumps(rule, sort_keys=True, ensure_ascii=False, default=str)
        kind = "+".join(_KINDS[name] for name in rule)
        return TeacherPrompt(kind=kind, sha256=hashlib.sha256(text.encode()).hexdigest())

    def chat(self, columns: Mapping[str, Any], *, answered: bool, with_images: bool) -> Conversation:
        """The chat that the teacher reads, as `conversation_of` returns that of the row. Raises `RowUnusable`."""
        source = self._source
        for name in self.columns:
            if not columns.get(name):
                raise RowUnusable(RejectReason.NO_TEACHER_PROMPT, f"column {name!r} is empty")
        if source.teacher_messages:
            source = source.model_copy(update={"messages": source.teacher_messages})
        chat = conversation_of(dict(columns), source, answered=answered, with_images=with_images)
        if chat is None:
            raise RowUnusable(RejectReason.NO_TEACHER_PROMPT, "the row is plain text, which has no prompt")
        messages = chat.messages
        if source.teacher_prompt:
            prompt = turns_of(columns[source.teacher_prompt], chat.tools, with_images=with_images)
            first = chat.first_learned(last_turn=source.loss_on == "last_turn") if answered else len(messages)
            messages = [*map(_not_learned, prompt), *messages[first:]]
        if source.teacher_system:
            rest = messages[1:] if messages[:1] and messages[0]["role"] in ("system", "developer") else messages
            messages = [{"role": "system", "content": source.teacher_system}, *rest]
        return chat._replace(messages=messages)

    def read(
        self,
        row: TokenSequence,
        token_ids: Sequence[int],
        loss_mask: Sequence[bool] | None,
        placeholders: Sequence[int],
    ) -> TokenSequence:
        """What the teacher reads for a row: `token_ids [E]`, with the row's images at `placeholders`.

        `loss_mask [E]`: its targets, None for a prompt. A teacher that reads what the row holds gets the row itself.
        Raises `RowUnusable`.
        """
        theirs = np.asarray(token_ids, np.int32)
        if theirs.size > self.max_read_length - (loss_mask is None):
            detail = f"{theirs.size} tokens, at most {self.max_read_length}"
            detail += " with an answer of at least one token" if loss_mask is None else ""
            raise RowUnusable(RejectReason.TEACHER_OVER_LONG, detail)
        spans = row.target_spans
        if loss_mask is not None:
            loss_on = np.array(loss_mask)
            loss_on[list(placeholders)] = False  # a teacher predicts text only
            spans = spans_from_mask(loss_on)
            _require_equal_targets(row, theirs, spans)
        elif not theirs.size:
            raise RowUnusable(RejectReason.NO_PROMPT, "no token before the answer")
        if np.array_equal(theirs, row.token_ids):
            return row
        return replace(
            row,
            token_ids=theirs,
            target_spans=spans,
            media=_moved(row.media, placeholders),
            stored=StoredRow(row.token_ids, row.target_spans, row.media),
        )


def _mentions(template: str | None, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template or "") is not None


def _not_learned(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the prompt: the answers in it, such as examples, are no targets."""
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def _moved(media: Sequence[MediaReference], placeholders: Sequence[int]) -> tuple[MediaReference, ...]:
    return tuple(replace(medium, position=position) for medium, position in zip(media, placeholders, strict=True))


def _require_equal_targets(row: TokenSequence, theirs: np.ndarray, spans: np.ndarray) -> None:
    """Raise `RowUnusable` unless both sides have as many spans, of equal lengths and labels."""
    if len(spans) != len(row.target_spans):
        raise _differs(f"{len(spans)} target spans for the teacher, {len(row.target_spans)} in the row")
    for number, ((start, stop), (own_start, own_stop)) in enumerate(zip(spans, row.target_spans, strict=True)):
        labels, own = theirs[start + 1 : stop + 1], row.token_ids[own_start + 1 : own_stop + 1]
        if labels.size != own.size:
            raise _differs(f"target span {number} has {labels.size} tokens for the teacher, {own.size} in the row")
        if (unequal := np.flatnonzero(labels != own)).size:
            at = int(unequal[0])
            raise _differs(f"token {at} of target span {number} is {labels[at]} for the teacher, {own[at]} in the row")


def _differs(detail: str) -> RowUnusable:
    return RowUnusable(RejectReason.ANSWER_DIFFERS, detail)
