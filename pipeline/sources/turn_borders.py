"""Finds the tokens of assistant turns in a chat, and proves them token by token.

A turn begins after the tokens that the teacher is shown before it, and stops at the first end token. What the template
changes once more messages follow is allowed for thinking only: many templates take it out of earlier turns.

Token ids are lists. A turn is the number of an assistant's message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from coldstill.common.visible import visible
from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason

from .chat_template import ChatTemplate
from .conversation import Conversation, RowUnusable

_SWITCHES = ("enable_thinking", "thinking")
"""Template arguments that change how an assistant turn opens: Qwen3, GLM-4.5, SmolLM3; DeepSeek-V3.1, Granite 3.2."""
_THINKING = re.compile(
    r"<think>.*?</think>\s*|<\|start\|>assistant<\|channel\|>analysis<\|message\|>.*?<\|end\|>", re.S
)
_EMPTY_THINKING = 8
"""Maximum number of tokens of a thinking block without content."""
_EXCERPT = 40
_PROBE = ("First question.", "First answer.", "Second question.", "Second answer.")


class Rendered(NamedTuple):
    """A chat, or its first messages, as text and as token ids."""

    text: str
    ids: list[int]


class Span(NamedTuple):
    """Tokens `[start, stop)`."""

    start: int
    stop: int


class TurnBorders:
    """The assistant turns of chats that one template renders.

    `stops`: tokens at which the teacher stops, besides the tokenizer's end of sequence. `cannot_mark`: the error for a
    template without proof, from what was found.
    """

    def __init__(self, template: ChatTemplate, stops: Iterable[int], cannot_mark: Callable[[str], TemplateCannotMark]):
        self._template, self._tokenizer, self._cannot_mark = template, template.tokenizer, cannot_mark
        self._stops = frozenset(id_ for id_ in (*stops, self._tokenizer.eos_token_id) if id_ is not None)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn, in ascending order: those at which the teacher stops, and the template's
        own end of turn if the template puts none of those after an answer."""
        in_history, at_the_end = self._after_answers
        own = {*in_history[:1]} & {*at_the_end[:1]} if not self._stops.intersection(in_history) else set()
        return tuple(sorted(self._stops | own))

    def rendered(
        self,
        messages: list[dict[str, Any]],
        chat: Conversation,
        *,
        prompted: bool = False,
        by: ChatTemplate | None = None,
    ) -> Rendered:
        """`messages` of a chat; `prompted`: followed by the start of an assistant turn. Raises `RowUnusable`."""
        text = (by or self._template).render(messages, chat, prompted=prompted)
        return Rendered(text, self._encoded(text))

    def span(self, chat: Conversation, turn: int, whole: Rendered) -> Span:
        """The tokens of a turn that the teacher would write. Raises `TemplateCannotMark`, `RowUnusable`."""
        prompt = self.rendered(chat.messages[:turn], chat, prompted=True)
        alone = whole if turn + 1 == len(chat.messages) else self.rendered(chat.messages[: turn + 1], chat)
        for start in self._starts(chat, turn, prompt, whole):
            is_shown = prompt.ids == whole.ids[:start]
            opened = self._after_opening(start, whole.ids[: len(alone.ids)], skip_space=not is_shown)
            for first in self._with_and_without_thinking(opened, whole.ids):
                stop = self._stop(chat.messages[turn], turn, first, prompt, alone, whole)
                if stop is not None:
                    if not is_shown:
                        self._require_own_text(chat.messages[turn], turn, whole.ids[first:stop])
                    return Span(first, stop)
        found = f"message {turn}, an assistant's, is rewritten once more messages follow"
        raise self._cannot_mark(f"{found}: {parting(alone.text, whole.text)}")

    # Where a turn begins

    def _starts(self, chat: Conversation, turn: int, prompt: Rendered, whole: Rendered) -> Iterator[int]:
        """Indices after the tokens that the teacher is shown before a turn; the first that has a stop counts."""
        is_shown = prompt.ids == whole.ids[: len(prompt.ids)]
        if is_shown:
            yield len(prompt.ids)
        # The turn may open as it does with thinking switched on or off: <think>\n\n</think>\n\n.
        others = [self.rendered(chat.messages[:turn], chat, prompted=True, by=other) for other in self._switched]
        fitting = {len(other.ids) for other in others if other.ids == whole.ids[: len(other.ids)]}
        yield from sorted(fitting, reverse=True)
        if is_shown or fitting:
            return
        history = self.rendered(chat.messages[:turn], chat)
        shared, begin = common(prompt.ids, whole.ids), common(history.ids, prompt.ids)
        is_split = shared >= begin - 1 and self._is_one_token_split(prompt.ids[shared:], whole.ids[shared:])
        if is_split or whole.text.startswith(prompt.text):
            raise _crossed(turn)
        # The whole chat may hold the history and lack the last tokens of the prompt, such as <think>\n.
        if shared > begin or (shared == begin and self._after_opening(shared, whole.ids, skip_space=True) > shared):
            yield shared
            return
        start = self._start_without_thinking(prompt.text, history.text, whole.text)
        if start is None:
            found = f"what precedes message {turn}, an assistant's, is rewritten once more messages follow"
            raise self._cannot_mark(f"{found}: {parting(prompt.text, whole.text)}")
        ids = self._encoded(whole.text[:start])
        if ids != whole.ids[: len(ids)]:
            raise _crossed(turn)
        yield len(ids)

    def _is_one_token_split(self, shown: list[int], whole: list[int]) -> bool:
        """Whether the text of one of two first tokens begins with that of the other."""
        if not shown or not whole or {shown[0], whole[0]} & self._special:
            return False
        ours, theirs = self.decoded(shown[:1]), self.decoded(whole[:1])
        return ours.startswith(theirs) or theirs.startswith(ours)

    def _start_without_thinking(self, prompt: str, history: str, whole: str) -> int | None:
        """Index of the character after the opening of a turn, if earlier turns have lost nothing but thinking."""
        opening = prompt[common(history, prompt) :]
        shown = _THINKING.sub("", prompt[: len(prompt) - len(opening)])
        kept = _without_thinking(whole)
        if not opening or "".join(whole[place] for place in kept[: len(shown)]) != shown:
            return None
        end = kept[len(shown) - 1] + 1 if shown else 0
        for start in (opening, opening.partition("<think>")[0]):
            if start and whole.startswith(start, end):
                return end + len(start)
        return None

    def _after_opening(self, start: int, ids: list[int], *, skip_space: bool) -> int:
        """`start`, or the index after an opening there, which prompts after a tool's result or an answer may lack."""
        for index in range(start, len(ids)) if self._opening else ():
            if ids[index : index + len(self._opening)] == self._opening:
                return index + len(self._opening)
            if not skip_space or self.decoded(ids[index : index + 1]).strip():
                break
        return start

    def _with_and_without_thinking(self, start: int, ids: list[int]) -> Iterator[int]:
        """`start`, and the index after the empty thinking that a template leaves in earlier turns."""
        yield start
        for index in range(start, min(start + _EMPTY_THINKING, len(ids))):
            text = self.decoded(ids[start : index + 1])
            if re.fullmatch(r"\s*(<think>)?\s*</think>", text):
                yield index + 1
                return

    @cached_property
    def _switched(self) -> list[ChatTemplate]:
        """The template with thinking switched on and off, where it has such a switch."""
        text = self._template.text or ""
        switches = [{name: value} for name in _SWITCHES if name in text for value in (False, True)]
        return [self._template.changed(arguments=switch) for switch in switches]

    @cached_property
    def _opening(self) -> list[int]:
        """What the prompt adds after a question."""
        question = self._template.readable([{"role": "user", "content": _PROBE[0]}])
        chat = Conversation([], None, ())
        try:
            history, prompt = self.rendered(question, chat), self.rendered(question, chat, prompted=True)
        except RowUnusable:
            return []
        return prompt.ids[common(history.ids, prompt.ids) :] if len(prompt.ids) > len(history.ids) else []

    # Where it stops

    def _stop(
        self, message: dict[str, Any], turn: int, start: int, prompt: Rendered, alone: Rendered, whole: Rendered
    ) -> int | None:
        """Index after the first end token of a turn that begins at `start`; None if no end is proven.

        `alone`: the chat up to the turn.
        """
        ids = whole.ids
        if alone.ids == ids[: len(alone.ids)]:
            return self._stop_in_prefix(message, turn, start, len(alone.ids), ids)
        # The template changes the turn once more messages follow: it takes out thinking, or writes another end. What is
        # left must be the end of the turn as it is without those messages, so it holds no word of them.
        begin, ends = common(prompt.ids, alone.ids), frozenset(self.end_token_ids)
        for own in self._own_tokens(begin, alone.ids):
            for index in range(start, min(len(ids), start + len(own) + 1)):
                length = index - start
                is_own = ids[start:index] == own[len(own) - length :] and (length or not own)
                if is_own and (ids[index] in ends or ids[index] in self._after_answers[0][:1]):
                    return index + (ids[index] in ends)
                if ids[index] in ends:
                    break
        return None

    def _own_tokens(self, begin: int, ids: list[int]) -> Iterator[list[int]]:
        """The tokens of the last turn of a chat without its end: to the first end token after `begin`, or to one that
        no text follows, for chats that differ from their prompt before that turn."""
        ends = [index for index in range(begin, len(ids)) if ids[index] in self.end_token_ids]
        yield ids[begin : ends[0] if ends else None]
        for end in ends[1:]:
            if not self.decoded([id_ for id_ in ids[end:] if id_ not in self._special]).strip():
                yield ids[begin:end]

    def _stop_in_prefix(self, message: dict[str, Any], turn: int, start: int, length: int, ids: list[int]) -> int:
        """`length`: number of tokens up to the end of the turn."""
        if length <= start:
            raise self._cannot_mark(f"message {turn}, an assistant's, adds no token to what precedes it")
        for index in range(start, length):
            if ids[index] in self.end_token_ids:
                return index + 1
        if length < len(ids) and ids[length] in self._stops:
            return length + 1  # the next role's token ends the turn, as in GLM-4
        _, text, rest = self.decoded(ids[start:length]).rpartition(self._own_texts(message)[-1] or "\0")
        if text and rest.strip():
            raise self._cannot_mark(f"{excerpt(rest)} after message {turn}, an assistant's, and no end token")
        return length

    def _require_own_text(self, message: dict[str, Any], turn: int, ids: list[int]) -> None:
        """All of a turn's text must be among its targets: its beginning may equal the end of a prompt by chance."""
        for text in self._own_texts(message):
            if self.decoded(self._encoded(text)).strip() not in self.decoded(ids):
                found = f"message {turn}, an assistant's: targets {excerpt(self.decoded(ids))} without all of its text"
                raise self._cannot_mark(found)

    def _own_texts(self, message: dict[str, Any]) -> list[str]:
        """The texts of a message without its thinking, which templates remove or move; at least one, maybe empty."""
        content = message.get("content")
        parts = content if isinstance(content, list) and self._template.sees_images else [{"text": content}]
        texts = [str(part["text"]) for part in parts if isinstance(part.get("text"), str)]
        return [text.rpartition("</think>")[2].strip() for text in texts] or [""]

    @cached_property
    def _after_answers(self) -> tuple[list[int], list[int]]:
        """Special tokens between an answer and the next question, and those after the last answer."""
        roles = ("user", "assistant", "user", "assistant")
        probe = [{"role": role, "content": text} for role, text in zip(roles, _PROBE, strict=True)]
        messages = self._template.readable(probe)
        try:
            text = self._template.render(messages, Conversation(messages, None, ()))
        except RowUnusable:
            return [], []
        if any(text.count(words) != 1 for words in _PROBE):
            return [], []
        _, first, second, last = (text.index(words) for words in _PROBE)
        return (
            self._special_ids(text[first + len(_PROBE[1]) : second]),
            self._special_ids(text[last + len(_PROBE[3]) :]),
        )

    # Text and tokens

    def _special_ids(self, text: str) -> list[int]:
        return [id_ for id_ in self._encoded(text) if id_ in self._special]

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset([*self._tokenizer.added_tokens_decoder, *self._tokenizer.all_special_ids])

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decoded(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)


def parting(before: str, whole: str) -> str:
    """Both texts at the place where they part, for an error."""
    at = common(before, whole)
    return (
        f"after {excerpt(whole[max(0, at - _EXCERPT // 2) : at])} one has {excerpt(before[at:])}, "
        f"the whole chat {excerpt(whole[at:])}"
    )


def excerpt(text: str) -> str:
    """The beginning of a text, with all characters visible."""
    cut = text[:_EXCERPT]
    return f'"{visible(cut)}{"..." if len(text) > len(cut) else ""}"' if text else "nothing"


def _without_thinking(text: str) -> list[int]:
    """Indices of the characters that are not thinking."""
    kept, end = list[int](), 0
    for block in _THINKING.finditer(text):
        kept += range(end, block.start())
        end = block.end()
    return [*kept, *range(end, len(text))]


def _crossed(turn: int) -> RowUnusable:
    detail = f"a token crosses the border between message {turn} and what precedes it"
    return RowUnusable(RejectReason.CANNOT_MARK, detail)
