"""Recovers the messages of a stored chat, and renders them by the student's chat template.

A dataset stores token ids. What a template writes between two messages is learned by rendering chats of marks, and a
row is split there. The result is proven: rendering the recovered messages gives the bytes and special tokens of the row
again. A row that was cut is a beginning of that, or ends within what the template writes between two messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from coldstill.common.errors import first_line
from coldstill.common.template_limits import limited
from coldstill.trainer.errors import TokenizerNotAligned

from .token_bytes import ByteText, TokenBytes

_MARKS = [f"Qz{number}kX" for number in range(5)]
_MAX_SPLITS = 64
"""Splits of a row that are rendered. Rows of known families have a few; a stranger's template could make thousands."""
_MAX_TURNS = 1024
_MAX_BORDER = 16 << 10
"""Bytes that a template may write between two messages; known families write at most some hundred."""


class Turn(NamedTuple):
    """A message, whose content is the bytes `start` to `stop` of the text."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Borders:
    """What the template writes before the first message and between messages.

    `opening`: by the role of the first message. `between`: by the roles of two neighbors; several texts where a
    template writes the last answer in another way. `closing`: behind the last answer.
    """

    opening: dict[str, bytes]
    between: dict[tuple[str, str], tuple[bytes, ...]]
    closing: bytes


class ChatTurns:
    """The chat template of `tokenizer`. It can be pickled.

    `arguments`: of the template. `day`: the date that a template shows, if it asks for one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: TokenBytes,
        *,
        arguments: dict[str, Any] | None = None,
        day: date | None = None,
    ):
        self._tokenizer, self._tokens = tokenizer, tokens
        self._arguments, self._day = arguments or {}, day

    def render(self, messages: Sequence[dict[str, str]]) -> ByteText:
        """The tokens of a chat. Raises any exception: a template is a program."""
        arguments = dict(self._arguments)
        if self._day is not None:
            arguments.setdefault("strftime_now", datetime.combine(self._day, time()).strftime)
        with limited(self._tokenizer.get_chat_template(), chat_template_utils):
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments)
        return self._tokens.encode(str(text))

    @cached_property
    def borders(self) -> Borders:
        """Raises `TokenizerNotAligned` if no chat can be rendered, or the template changes the marks."""
        opening: dict[str, bytes] = {}
        between: dict[tuple[str, str], tuple[bytes, ...]] = {}
        closing, problem = b"", ""
        for roles in (("user", "assistant") * 2, ("system", *("user", "assistant") * 2)):
            try:
                text = self.render([_message(role, mark) for role, mark in zip(roles, _MARKS, strict=False)]).text
            except Exception as error:
                problem = problem or first_line(error)
                continue
            parts = _split_at(text, [mark.encode() for mark in _MARKS[: len(roles)]])
            if parts is None:
                problem = problem or "the template changes the text of messages"
                continue
            if (most := max(map(len, parts[1:]))) > _MAX_BORDER:
                problem = problem or f"{most:,} bytes around a message, more than {_MAX_BORDER:,}"
                continue
            opening[roles[0]] = parts[0]
            for pair, part in zip(pairwise(roles), parts[1:-1], strict=True):
                between[pair] = tuple(dict.fromkeys((*between.get(pair, ()), part)))
            closing = parts[-1]
        if not opening or not all(map(all, between.values())):
            raise TokenizerNotAligned(
                f"chat template of {self._tokens.where}",
                found=problem or "no text between two messages",
                wanted="a template that renders chats of user and assistant",
                fix="save the tokenizer with its chat_template, or capture the chats as text",
            )
        return Borders(opening, between, closing)

    @cached_property
    def end_id(self) -> int | None:
        """The special token right behind an answer, None if there is none. Raises `TokenizerNotAligned`."""
        _ = self.borders
        chat = self.render([_message("user", _MARKS[0]), _message("assistant", _MARKS[1])])
        place = self.place_behind(chat, chat.text.rindex(_MARKS[1].encode()) + len(_MARKS[1]))
        return None if place is None else int(chat.ids[place])

    def place_behind(self, chat: ByteText, stop: int) -> int | None:
        """The number of the special token that begins at the byte `stop`."""
        place = int(np.searchsorted(chat.ends, stop, side="right"))
        begins = place < chat.ids.size and chat.starts[place] == stop
        return place if begins and self._tokens.special[chat.ids[place]] else None

    def turns(self, text: bytes) -> list[list[Turn]]:
        """The ways in which `text` may be split into turns; most probable first, at most `_MAX_SPLITS`."""
        # The longest opening first: one may show a default system message before that of the user.
        by_length = sorted(self.borders.opening.items(), key=lambda item: -len(item[1]))
        found = (
            turns
            for role, part in by_length
            if text.startswith(part)
            for turns in self._splits(text, role, len(part))
            if any(turn.role == "assistant" for turn in turns)
        )
        return list(islice(found, _MAX_SPLITS))

    def messages(self, row: ByteText) -> tuple[list[dict[str, str]], list[Turn]] | None:
        """The proven messages of a row and their places in it; None if no split can be proven."""
        text = _without_half_character(row.text)
        for turns in self.turns(text):
            try:
                messages = [_message(turn.role, text[turn.start : turn.stop].decode()) for turn in turns]
                rendered = self.render(messages)
            except Exception:  # bytes that are no text, or a program that rejects the messages
                continue
            # Behind the last message the row may have the beginning of a longer chat, as `_splits` has found.
            size = _common(rendered.text, text)
            if size >= turns[-1].stop and self._same_specials(row, rendered, size):
                return messages, turns
        return None

    def _splits(self, text: bytes, role: str, start: int) -> Iterator[list[Turn]]:
        """The splits after an opening: they differ in where the content of the last message ends. None if there are
        more than `_MAX_TURNS` messages."""
        turns: list[Turn] = []
        while True:
            following = [
                (found, -len(part), after)
                for (before, after), parts in self.borders.between.items()
                for part in parts
                if before == role and (found := text.find(part, start)) >= 0
            ]
            if not following:
                break
            stop, length, after = min(following)
            turns.append(Turn(role, start, stop))
            role, start = after, stop - length
            if len(turns) > _MAX_TURNS:
                return
        # A row may be cut within what the template writes behind a message. That is no text of the message.
        endings = [part for (before, _), parts in self.borders.between.items() if before == role for part in parts]
        if role == "assistant":
            endings.append(self.borders.closing)
        rest = text[start:]
        sizes = {size for part in endings for size in range(1, len(part) + 1) if rest.endswith(part[:size])}
        longest = sorted(sizes, reverse=True)[: _MAX_SPLITS // 4]
        # Templates that trim messages render a cut one without the white space at its end.
        for size in dict.fromkeys([*longest, 0, len(rest) - len(rest.rstrip())]):
            yield [*turns, Turn(role, start, len(text) - size)]

    def _same_specials(self, row: ByteText, rendered: ByteText, size: int) -> bool:
        """Whether the first `size` bytes have the same special tokens."""
        return self._tokens.specials_in(row, 0, size) == self._tokens.specials_in(rendered, 0, size)


def _without_half_character(text: bytes) -> bytes:
    """The text without the first bytes of a character at its end: a row may be cut within one."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return text[: error.start]
    return text


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both texts begin with."""
    size = min(len(one), len(other))
    if not size:
        return 0
    differs = np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    return int(differs.argmax()) if differs.any() else size


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _split_at(text: bytes, marks: Sequence[bytes]) -> list[bytes] | None:
    """The parts of `text` between `marks`, which are in it in order and once each; None otherwise."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        parts.append(before)
    return [*parts, text]
