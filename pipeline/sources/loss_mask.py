"""Loss mask of a chat: which of its token ids are the assistant's.

The mask is derived and proven token by token. A turn's targets begin after the tokens that the teacher is shown before
it, and stop at the first end token. Where the template rewrites what precedes a turn there is no such proof: then marks
in the template ({% generation %}) select the tokens, and the chat rendered up to that turn proves them.

Shape letters: `T` tokens. Token ids and loss masks are lists of length T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from coldstill.common.visible import visible
from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason

from .chat_template import ChatTemplate
from .conversation import Conversation, RowUnusable
from .marked_template import Mark, MarkedTemplate, marked_copy, without_opening

_SWITCHES = ("enable_thinking", "thinking")
"""Template arguments that change the start of an assistant turn: Qwen3, GLM-4.5, SmolLM3; DeepSeek-V3.1, Granite."""
_EXCERPT = 40
_PROBE = ("First question.", "First answer.", "Second question.", "Second answer.")


class _Rendered(NamedTuple):
    """A chat, or its first messages, as text and as token ids."""

    text: str
    ids: list[int]


class _Span(NamedTuple):
    """Tokens `[start, stop)`."""

    start: int
    stop: int


class _Marks(NamedTuple):
    """The marks of a chat, and the characters of each of its tokens."""

    marks: list[Mark]
    borders: list[Mark]


class LossMask:
    """Marks the target tokens of chats that one template renders.

    `end_token_ids`: tokens at which the teacher stops, besides the tokenizer's end of sequence.
    """

    def __init__(self, template: ChatTemplate, loss_on: str, end_token_ids: Iterable[int] = ()):
        self._template, self._loss_on = template, loss_on
        tokenizer = template.tokenizer
        self._stops = frozenset(id_ for id_ in (*end_token_ids, tokenizer.eos_token_id) if id_ is not None)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn, in ascending order: those at which the teacher stops, and the template's
        own if no such token follows the assistant's turns in it."""
        return tuple(sorted(self._stops | ({self._own_end} if self._own_end is not None else set())))

    def ids_and_loss_mask(self, chat: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them are target tokens.

        Raises `TemplateCannotMark` if the template does not determine the mask, `RowUnusable` if it does but this row
        cannot be masked.
        """
        whole = self._rendered(chat.messages, chat)
        if self._loss_on == "all":
            return whole.ids, [True] * len(whole.ids)
        loss_mask = [False] * len(whole.ids)
        for start, stop in self._spans(chat, whole):
            loss_mask[start:stop] = [True] * (stop - start)
        return whole.ids, loss_mask

    def _spans(self, chat: Conversation, whole: _Rendered) -> Iterator[_Span]:
        every = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        turns = every[-1:] if self._loss_on == "last_turn" else every
        marks: _Marks | None = None
        if self._template.has_marks and turns:
            marks = self._marks(chat, whole)
        for turn in turns:
            if chat.messages[turn].get("weight", 1) == 0:
                continue
            try:
                span = self._proven_span(chat, turn, whole)
            except TemplateCannotMark as error:
                marks = marks or (self._marks(chat, whole) if self._marked else None)
                if marks is None:
                    raise
                yield from self._marked_spans(chat, turn, whole, marks, error)
            else:
                yield from self._selected(span, whole, marks) if self._template.has_marks and marks else [span]

    # Proof without marks

    def _proven_span(self, chat: Conversation, turn: int, whole: _Rendered) -> _Span:
        start = self._start(chat, turn, whole)
        return _Span(start, self._stop(chat, turn, start, whole))

    def _start(self, chat: Conversation, turn: int, whole: _Rendered) -> int:
        """Index of the first token of a turn that the teacher is not shown."""
        prompt = self._rendered(chat.messages[:turn], chat, prompted=True)
        if prompt.ids == whole.ids[: len(prompt.ids)]:
            return len(prompt.ids)
        # The turn may begin as it does with thinking switched on or off: <think>\n\n</think>\n\n.
        others = [self._rendered(chat.messages[:turn], chat, prompted=True, template=other) for other in self._switched]
        if fitting := [len(other.ids) for other in others if other.ids == whole.ids[: len(other.ids)]]:
            return max(fitting)
        shared = _shared(prompt.ids, whole.ids)
        history = self._rendered(chat.messages[:turn], chat)
        is_split = self._is_one_token_split(prompt.ids[shared:], whole.ids[shared:])
        if whole.text.startswith(prompt.text) or (is_split and shared >= _shared(history.ids, prompt.ids) - 1):
            detail = f"a token crosses the border between message {turn} and what precedes it"
            raise RowUnusable(RejectReason.CANNOT_MARK, detail)
        if shared < _shared(history.ids, prompt.ids):
            found = f"what precedes message {turn}, an assistant's, is rewritten once more messages follow"
            raise self._cannot_mark(f"{found}: {_parting(prompt.text, whole.text)}")
        # All of the history is there, and the prompt's last words are not: <think>\n, of which history keeps nothing.
        self._require_own_text(chat, turn, shared, prompt, whole)
        return shared

    def _is_one_token_split(self, shown: list[int], whole: list[int]) -> bool:
        """Whether the texts of two first tokens are one the beginning of the other."""
        if not shown or not whole or {shown[0], whole[0]} & self._special:
            return False
        ours, theirs = self._decoded(shown[:1]), self._decoded(whole[:1])
        return ours.startswith(theirs) or theirs.startswith(ours)

    def _require_own_text(self, chat: Conversation, turn: int, start: int, prompt: _Rendered, whole: _Rendered) -> None:
        """The turn's own text must begin at `start`: nothing of it may equal the end of the prompt by chance."""
        text = _own_text(chat.messages[turn])
        shown = self._decoded(whole.ids[start : self._stop(chat, turn, start, whole)])
        if text and text not in shown:
            found = f"message {turn}, an assistant's, is not where its prompt ends"
            raise self._cannot_mark(f"{found}: {_parting(prompt.text, whole.text)}")

    def _stop(self, chat: Conversation, turn: int, start: int, whole: _Rendered) -> int:
        """Index after the tokens of a turn that begins at `start`: after its first end token."""
        is_last = turn + 1 == len(chat.messages)
        alone = whole if is_last else self._rendered(chat.messages[: turn + 1], chat)
        if alone.ids == whole.ids[: len(alone.ids)]:
            return self._stop_in_prefix(chat.messages[turn], turn, start, len(alone.ids), whole.ids)
        # The template changes the turn once more messages follow: it removes the thinking, or writes another end. The
        # tokens shown now must then be the end of what the turn is without those messages, which holds no word of them.
        if alone.ids[:start] == whole.ids[:start]:
            ends = set(self.end_token_ids)
            own = alone.ids[start : next((i for i in range(start, len(alone.ids)) if alone.ids[i] in ends), None)]
            for index in range(start, min(len(whole.ids), start + len(own) + 1)):
                length = index - start
                is_own = whole.ids[start:index] == own[len(own) - length :] and (length or not own)
                if is_own and whole.ids[index] in self._closers:
                    return index + (whole.ids[index] in ends)
        found = f"message {turn}, an assistant's, is rewritten once more messages follow"
        raise self._cannot_mark(f"{found}: {_parting(alone.text, whole.text)}")

    def _stop_in_prefix(self, message: dict[str, Any], turn: int, start: int, length: int, ids: list[int]) -> int:
        """`length`: number of tokens up to the end of the turn."""
        if length <= start:
            raise self._cannot_mark(f"message {turn}, an assistant's, adds no token to what precedes it")
        for index in range(start, length):
            if ids[index] in self.end_token_ids:
                return index + 1
        if length < len(ids) and ids[length] in self._stops:
            return length + 1  # the next role's token ends the turn, as in GLM-4
        _, text, rest = self._decoded(ids[start:length]).rpartition(_own_text(message) or "\0")
        if text and rest.strip():
            found = f"{_excerpt(rest)} after message {turn}, an assistant's, and no end token"
            raise self._cannot_mark(found)
        return length

    # The template's own end token

    @cached_property
    def _own_end(self) -> int | None:
        """The token that closes each assistant turn, if none at which the teacher stops does."""
        in_history, at_the_end = self._after_answers
        if self._stops.intersection(in_history):
            return None
        first, last = next(iter(in_history), None), next(iter(at_the_end), None)
        return first if first == last else None

    @cached_property
    def _closers(self) -> frozenset[int]:
        """Tokens that may follow the last token of a turn's own text; some only in history (GPT-OSS: <|end|>)."""
        return frozenset([*self.end_token_ids, *self._after_answers[0][:1]])

    @cached_property
    def _after_answers(self) -> tuple[list[int], list[int]]:
        """Special tokens between an answer and the next question, and those after the last answer."""
        question, answer, again, last = _PROBE
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, _PROBE, strict=True)]
        try:
            text = self._template.render(messages, Conversation(messages, None, ()))
        except RowUnusable:
            return [], []
        if not all(text.count(words) == 1 for words in (question, answer, again, last)):
            return [], []
        between = text[text.index(answer) + len(answer) : text.index(again)]
        return self._special_ids(between), self._special_ids(text[text.index(last) + len(last) :])

    def _special_ids(self, text: str) -> list[int]:
        return [id_ for id_ in self._encoded(text) if id_ in self._special]

    # Marks

    @cached_property
    def _marked(self) -> MarkedTemplate | None:
        """The template with marks: the settings', or the package's copy of a template that needs them."""
        text = self._template.text or ""
        text = text if self._template.has_marks else marked_copy(text) or ""
        return MarkedTemplate(self._template, text) if text else None

    def _marks(self, chat: Conversation, whole: _Rendered) -> _Marks:
        assert self._marked is not None
        text, marks = self._marked.render(chat)
        if text != whole.text:
            raise self._cannot_mark(f"marks that change the text: {_parting(whole.text, text)}")
        return _Marks(marks, self._borders(whole.text))

    def _selected(self, proven: _Span, whole: _Rendered, marks: _Marks) -> Iterator[_Span]:
        """What the marks select of a proven span, with the end token that follows."""
        for mark in marks.marks:
            begin, end = self._tokens_of(mark, proven, whole, marks)
            if begin < end:
                yield _Span(begin, self._with_end(end, proven.stop, whole.ids))

    def _tokens_of(self, mark: Mark, among: _Span, whole: _Rendered, marks: _Marks, opening: str = "") -> _Span:
        """The tokens of a mark. One that also holds unmarked text, other than spaces that the assistant writes, rejects
        the row."""
        inside = [
            index
            for index in range(among.start, among.stop)
            if marks.borders[index].first < mark.last and marks.borders[index].last > mark.first
        ]
        if not inside:
            return _Span(0, 0)
        before = whole.text[marks.borders[inside[0]].first : mark.first]
        after = whole.text[mark.last : marks.borders[inside[-1]].last]
        if before.strip() or after.strip() or (before and opening.endswith(before)):
            detail = f"a token crosses a mark: it also holds {_excerpt(before or after)}"
            raise RowUnusable(RejectReason.CANNOT_MARK, detail)
        return _Span(inside[0], inside[-1] + 1)

    def _with_end(self, end: int, stop: int, ids: list[int]) -> int:
        """`end`, or the index after the end token that follows with at most spaces between."""
        for index in range(end, stop):
            if ids[index] in self.end_token_ids:
                return index + 1
            if self._decoded(ids[index : index + 1]).strip():
                break
        return end

    def _marked_spans(
        self, chat: Conversation, turn: int, whole: _Rendered, marks: _Marks, error: TemplateCannotMark
    ) -> Iterator[_Span]:
        """Marked tokens of a turn that has no proof without marks.

        A mark must be text of the turn as the template renders it before the later messages are there. Marks belong to
        turns in their order. Raises `error` where the turn has none.
        """
        every = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        owners, owner, own, openings, at = iter(every), -1, "", ("",), 0
        found = False
        for mark in marks.marks:
            mark = without_opening(whole.text, mark, openings)
            while (place := own.find(whole.text[mark.first : mark.last], at)) < 0 or owner < 0:
                owner, at = next(owners, -1), 0
                if owner < 0:
                    text = whole.text[mark.first : mark.last]
                    raise self._cannot_mark(f"a mark around {_excerpt(text)}, which is no text of an assistant's turn")
                own, openings = self._own_rendering(chat, owner)
                mark = without_opening(whole.text, mark, openings)
            at = place + mark.last - mark.first
            if owner == turn and mark.first < mark.last:
                found = True
                start, stop = self._tokens_of(mark, _Span(0, len(whole.ids)), whole, marks, openings[0])
                ends = (index + 1 for index in range(start, stop) if whole.ids[index] in self.end_token_ids)
                yield _Span(start, self._with_end(next(ends, stop), len(whole.ids), whole.ids))
        if not found:
            raise error

    def _own_rendering(self, chat: Conversation, turn: int) -> tuple[str, tuple[str, ...]]:
        """What a turn adds to the text before it, and what the prompt adds: as a whole, and without thinking."""
        prompt = self._rendered(chat.messages[:turn], chat, prompted=True).text
        history = self._rendered(chat.messages[:turn], chat).text
        alone = self._rendered(chat.messages[: turn + 1], chat).text
        begin = _shared(history, prompt)
        opening = prompt[begin:]
        return alone[min(begin, _shared(history, alone)) :], (opening, opening.partition("<think>")[0])

    def _borders(self, text: str) -> list[Mark]:
        """The characters of each token. Tokens lie end to end: spaces before a token belong to it, and each token of a
        character that is several tokens has all of it."""
        encoded = self._template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        borders: list[Mark] = []
        reached = 0
        for first, last in encoded["offset_mapping"]:
            borders.append(Mark(min(first, reached), max(last, reached)))
            reached = borders[-1].last
        return borders

    # Text and tokens

    @cached_property
    def _switched(self) -> list[ChatTemplate]:
        """The template with thinking switched on and off, where it has such a switch."""
        text = self._template.text or ""
        return [
            self._template.changed(arguments={name: value})
            for name in _SWITCHES
            if name in text
            for value in (False, True)
        ]

    @cached_property
    def _special(self) -> frozenset[int]:
        tokenizer = self._template.tokenizer
        return frozenset([*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids])

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        chat: Conversation,
        *,
        prompted: bool = False,
        template: ChatTemplate | None = None,
    ) -> _Rendered:
        text = (template or self._template).render(messages, chat, prompted=prompted)
        return _Rendered(text, self._encoded(text))

    def _encoded(self, text: str) -> list[int]:
        return list(self._template.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decoded(self, ids: list[int]) -> str:
        return str(self._template.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _cannot_mark(self, found: str) -> TemplateCannotMark:
        marks = "correct the marks" if self._template.has_marks else "add {% generation %} marks to a copy"
        settings = {"assistant": "last_turn or all", "last_turn": "all"}[self._loss_on]
        return TemplateCannotMark(
            self._template.name,
            found=found,
            wanted=f"a template that shows which tokens are the assistant's, because source.loss_on is {self._loss_on}",
            fix=f"{marks} of the template (see examples/) and set source.chat_template to it, or source.loss_on to "
            f"{settings}",
        )


def _own_text(message: dict[str, Any]) -> str:
    """The text of a message without its thinking, which templates remove or move."""
    content = message.get("content")
    return content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)


def _parting(before: str, whole: str) -> str:
    """Both texts at the place where they part."""
    at = _shared(before, whole)
    return (
        f"after {_excerpt(whole[max(0, at - _EXCERPT // 2) : at])} one has {_excerpt(before[at:])}, "
        f"the whole chat {_excerpt(whole[at:])}"
    )


def _excerpt(text: str) -> str:
    cut = text[:_EXCERPT]
    return f'"{visible(cut)}{"..." if len(text) > len(cut) else ""}"' if text else "nothing"
