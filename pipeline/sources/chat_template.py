"""Turns a chat into token ids and a loss mask with the chat template.

The chat is in a column of messages, or in a prompt and its response. If the template marks the assistant's tokens
({% generation %}), one call gives ids and mask. Otherwise the mask is derived and verified token by token: the ids that
the teacher would be shown before an assistant turn must be a prefix of the ids of the whole chat.

Shape letters: `T` tokens. Token ids and loss masks are lists of length T.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from coldstill.pipeline.config import SourceConfig
from coldstill.pipeline.errors import SourceNotFound, TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason

# The tag with which a template marks the assistant's tokens; the same pattern as in transformers' tokenizer code.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RowUnusable(Exception):
    """A row cannot become a sequence. The reason is counted; the detail explains it."""

    def __init__(self, reason: RejectReason, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class Conversation(NamedTuple):
    """Messages, and the tools that the assistant may call; `columns` are those that they were read from."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    columns: tuple[str, ...]


def conversation_of(columns: dict[str, Any], source: SourceConfig, *, answered: bool) -> Conversation | None:
    """The chat of a row, None for a row without one.

    `answered`: with the answer to the prompt; otherwise without the assistant messages at the end.
    Raises `RowUnusable`.
    """
    tools = _tools(columns.get(source.tools))
    if columns.get(source.messages):
        messages = _checked(columns[source.messages])
        used: tuple[str, ...] = (source.messages, source.tools)
    elif columns.get(source.prompt) and (columns.get(source.response) or not (answered and columns.get(source.text))):
        messages = _turn(columns[source.prompt], role="user")
        if answered:
            if not columns.get(source.response):
                detail = f"column {source.response!r} is empty, {source.prompt!r} is not"
                raise RowUnusable(RejectReason.NO_RESPONSE, detail)
            messages += _turn(columns[source.response], role="assistant")
        used = (source.prompt, source.response, source.tools)
    else:
        return None
    if not answered:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise RowUnusable(RejectReason.NO_PROMPT, "all messages are the assistant's")
    return Conversation(messages, tools, used)


class ChatTemplate:
    """A tokenizer's chat template, or the one that the settings name instead."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig):
        self._tokenizer, self._source = tokenizer, source
        self.text = _text(tokenizer, source)
        self._has_marks = bool(self.text and _GENERATION_TAG.search(self.text))
        self.name = source.chat_template or f"chat template of {tokenizer.name_or_path}"

    @property
    def sha256(self) -> str | None:
        """Digest of the template and of its arguments."""
        if not self.text:
            return None
        arguments = self._source.template_arguments
        said = f"{self.text}\n{json.dumps(arguments, sort_keys=True, default=str)}" if arguments else self.text
        return hashlib.sha256(said.encode()).hexdigest()

    def require(self) -> None:
        """Raise `TemplateCannotMark` if there is no template."""
        if not self.text:
            raise TemplateCannotMark(
                self.name, found="no chat template", wanted="one", fix="set source.chat_template to a Jinja file"
            )

    def prompt(self, chat: Conversation) -> list[int]:
        """Token ids of a chat up to the start of the assistant's next turn. Raises `RowUnusable`."""
        return self._ids(chat.messages, chat, prompted=True)

    def ids_and_loss_mask(self, chat: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them are target tokens.

        Raises `TemplateCannotMark` if the template does not determine the mask, `RowUnusable` if it does but this row
        cannot be masked.
        """
        if self._source.loss_on == "all":
            token_ids = self._ids(chat.messages, chat)
            return token_ids, [True] * len(token_ids)
        if not self._has_marks:
            token_ids = self._ids(chat.messages, chat)
            return token_ids, self._derived_mask(chat, token_ids)
        encoded = self._apply(chat.messages, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        loss_mask = [bool(bit) for bit in encoded["assistant_masks"]]
        return list(encoded["input_ids"]), _last_run(loss_mask) if self._source.loss_on == "last_turn" else loss_mask

    def _derived_mask(self, chat: Conversation, token_ids: list[int]) -> list[bool]:
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self._source.loss_on == "last_turn":
            turns = turns[-1:]
        loss_mask = [False] * len(token_ids)
        for turn in turns:
            shown = self._ids(chat.messages[:turn], chat, prompted=True)
            self._require_prefix(chat, turn, shown, token_ids)
            stop = self._end_of(chat, turn, len(shown), token_ids)
            loss_mask[len(shown) : stop] = [True] * (stop - len(shown))
        return loss_mask

    def _require_prefix(self, chat: Conversation, turn: int, shown: list[int], token_ids: list[int]) -> None:
        """The ids that the teacher is shown before a turn must be a prefix of the whole chat's."""
        if shown == token_ids[: len(shown)]:
            return
        before, whole = self._render(chat.messages[:turn], chat, prompted=True), self._render(chat.messages, chat)
        if whole.startswith(before):
            detail = f"a token crosses the border between message {turn} and what precedes it"
            raise RowUnusable(RejectReason.CANNOT_MARK, detail)
        raise self._cannot_mark(f"what precedes message {turn}, an assistant's, is rewritten once more messages follow")

    def _end_of(self, chat: Conversation, turn: int, start: int, token_ids: list[int]) -> int:
        """Index after the tokens of a turn that begins at `start`.

        The turn ends with its last end-of-sequence token, at which the teacher stops, or else with its last token.
        """
        until = self._ids(chat.messages[: turn + 1], chat) if turn + 1 < len(chat.messages) else token_ids
        end = self._tokenizer.eos_token_id
        if until == token_ids[: len(until)]:
            if len(until) <= start:
                raise self._cannot_mark(f"message {turn}, an assistant's, adds no token to what precedes it")
            ends = [index for index in range(start, len(until)) if token_ids[index] == end]
            return ends[-1] + 1 if ends else len(until)
        # The template changes the turn once more messages follow; for instance it removes the thinking. The tokens that
        # are shown now must then be the end of the turn's own content.
        stop = token_ids.index(end, start) if end in token_ids[start:] else start
        shown = self._tokenizer.decode(token_ids[start:stop], clean_up_tokenization_spaces=False).strip()
        content = chat.messages[turn]["content"]
        if shown and isinstance(content, str) and content.strip().endswith(shown):
            return stop + 1
        raise self._cannot_mark(f"message {turn}, an assistant's, is rewritten once more messages follow")

    def _ids(self, messages: list[dict[str, Any]], chat: Conversation, *, prompted: bool = False) -> list[int]:
        encoded = self._apply(messages, chat, tokenize=True, return_dict=True, add_generation_prompt=prompted)
        return list(encoded["input_ids"])

    def _render(self, messages: list[dict[str, Any]], chat: Conversation, *, prompted: bool = False) -> str:
        return str(self._apply(messages, chat, tokenize=False, add_generation_prompt=prompted))

    def _apply(self, messages: list[dict[str, Any]], chat: Conversation, **options: Any) -> Any:
        self.require()
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=chat.tools, chat_template=self.text, **self._source.template_arguments, **options
            )
        except Exception as error:  # a template is a program, and may raise any exception
            raise RowUnusable(RejectReason.TEMPLATE_FAILED, f"{type(error).__name__}: {error}") from None

    def _cannot_mark(self, found: str) -> TemplateCannotMark:
        return TemplateCannotMark(
            self.name,
            found=found,
            wanted=f"marks around the assistant's tokens, because source.loss_on is {self._source.loss_on}",
            fix="set source.chat_template to a copy with {% generation %} marks (see examples/), or source.loss_on to "
            "last_turn or all",
        )


def _text(tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> str | None:
    if source.chat_template is None:
        named = tokenizer.chat_template
        return named.get("default") if isinstance(named, dict) else named
    try:
        return Path(source.chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise SourceNotFound(
            source.chat_template, found=error.strerror, wanted="a Jinja chat template", fix="check source.chat_template"
        ) from None


def _last_run(loss_mask: list[bool]) -> list[bool]:
    """The mask with only its last run of target tokens."""
    stop = len(loss_mask) - loss_mask[::-1].index(True) if True in loss_mask else 0
    start = stop
    while start and loss_mask[start - 1]:
        start -= 1
    return [start <= index < stop for index in range(len(loss_mask))]


def _turn(value: object, *, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _checked(value)


def _checked(messages: object) -> list[dict[str, Any]]:
    """Messages without null fields, which typed columns add because other messages have those fields."""
    bad = RejectReason.BAD_MESSAGES
    if not isinstance(messages, list):
        raise RowUnusable(bad, f"messages are {type(messages).__name__}, not a list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowUnusable(bad, f"message {index} has no role")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise RowUnusable(bad, f"content of message {index} is {type(content).__name__}, neither text nor parts")
    return [
        {name: value for name, value in {"content": None, **message}.items() if value is not None or name == "content"}
        for message in messages
    ]


def _tools(tools: object) -> list[Any] | None:
    """Tools as a list; many datasets store them as JSON text."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowUnusable(RejectReason.BAD_TOOLS, f"tools are not JSON: {error}") from None
    if tools and not isinstance(tools, list):
        raise RowUnusable(RejectReason.BAD_TOOLS, f"tools are {type(tools).__name__}, not a list")
    return tools or None  # type: ignore[return-value]
