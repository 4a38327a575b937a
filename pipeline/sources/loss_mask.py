"""Loss mask of a chat: which of its token ids are the assistant's.

`turn_borders.py` proves the tokens of each turn that the teacher would write. Marks in the template ({% generation %})
select among them, and stand in for the proof where the template rewrites what precedes a turn.

transformers' own masks of marked templates lose tokens where a mark ends in token 0, in white space, or inside a
character of several tokens. Here the marks are characters in the rendered text, put there by the template itself.

Shape letters: `T` tokens. Token ids and loss masks are lists of length T.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason

from .chat_template import ChatTemplate, Fitted
from .conversation import Conversation, RowUnusable
from .turn_borders import Rendered, Span, TurnBorders, common, excerpt, parting

_OPEN, _CLOSE = "\U000f1de0", "\U000f1de1"
"""Private characters that stand for the two tags in the rendered text."""
_MAX_LOST = 3
"""Maximum number of dropped parts that a reject names."""
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class _Mark(NamedTuple):
    """Characters `[first, last)` of a rendered chat."""

    first: int
    last: int


class _MarkedTemplate:
    """A template with {% generation %} marks around the assistant's text."""

    def __init__(self, template: ChatTemplate):
        # Whether a tag removes the spaces and the line end beside it depends on its kind: these are block tags as well.
        self._template = template.changed(text=_TAG.sub(_visible_tag, template.text or ""))

    def render(self, chat: Conversation) -> tuple[str, list[_Mark]]:
        """The text of a chat, and its marks in their order; empty ones are left out.

        Raises `TemplateCannotMark` for marks that are not closed, and `RowUnusable` as `ChatTemplate.render`.
        """
        parts = re.split(f"([{_OPEN}{_CLOSE}])", self._template.render(chat.messages, chat))
        if parts[1::2] != [_OPEN, _CLOSE] * (len(parts) // 4):
            raise TemplateCannotMark(
                self._template.name,
                found="marks inside of marks, or private characters in the text",
                wanted="{% generation %} and {% endgeneration %} in turn",
                fix="correct the template that source.chat_template names",
            )
        marks, length = [], 0
        for index, part in enumerate(parts[::2]):
            if index % 2 and part:
                marks.append(_Mark(length, length + len(part)))
            length += len(part)
        return "".join(parts[::2]), marks


class _Marks(NamedTuple):
    """The marks of a chat, and the characters of each of its tokens."""

    marks: list[_Mark]
    borders: list[_Mark]


class LossMask:
    """Marks the target tokens of chats that one template renders.

    `stops`: tokens at which the teacher stops, besides the tokenizer's end of sequence.
    """

    def __init__(self, template: ChatTemplate, loss_on: str, stops: Iterable[int] = ()):
        self._template, self._loss_on = template, loss_on
        self._turns = TurnBorders(template, stops, self._cannot_mark)
        self._marked = _MarkedTemplate(template) if template.has_marks else None

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn; the first of them is a turn's last target."""
        return self._turns.end_token_ids

    def ids_and_loss_mask(
        self, chat: Conversation, *, most: int | None = None, until: int | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them are target tokens.

        `until`: the mask may end there, because the rest of the chat is cut off. Turns that begin later are not looked
        for.

        `most`: maximum number of tokens. The turns of a longer chat are not looked for: each is found by rendering all
        that precedes it, so a row of ten thousand short turns would take hours. Raises `TemplateCannotMark` if the
        template does not determine the mask, `RowUnusable` if it does but this row cannot be masked.
        """
        whole = self._turns.rendered(chat.messages, chat)
        if most is not None and len(whole.ids) > most:
            raise RowUnusable(RejectReason.OVER_LONG, f"{len(whole.ids)} tokens, at most {most}")
        if self._loss_on == "all":
            return whole.ids, [True] * len(whole.ids)
        loss_mask = [False] * len(whole.ids)
        for start, stop in self._spans(chat, whole, len(whole.ids) if until is None else until):
            loss_mask[start:stop] = [True] * (stop - start)
        return whole.ids, loss_mask

    def _spans(self, chat: Conversation, whole: Rendered, until: int) -> Iterator[Span]:
        turns = _assistant_turns(chat)
        marks = self._marks(chat, whole)
        for turn in turns[-1:] if self._loss_on == "last_turn" else turns:
            if not chat.is_learned(turn):
                continue
            try:
                span = self._turns.span(chat, turn, whole)
            except TemplateCannotMark as error:
                if marks is None:
                    raise
                found = list(self._marked_spans(chat, turn, whole, marks, error))
            else:
                found = [span] if marks is None else list(self._selected(span, whole, marks))
            yield from found
            if found and found[0].start >= until:
                return

    def _marks(self, chat: Conversation, whole: Rendered) -> _Marks | None:
        if self._marked is None:
            return None
        text, marks = self._marked.render(chat)
        if text != whole.text:
            raise self._cannot_mark(f"marks that change the text: {parting(text, whole.text)}")
        return _Marks(marks, self._borders(whole.text))

    def _borders(self, text: str) -> list[_Mark]:
        """The characters of each token. Tokens lie end to end: spaces before a token belong to it, and each token of a
        character that is several tokens has all of it."""
        encoded = self._template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        borders: list[_Mark] = []
        reached = 0
        for first, last in encoded["offset_mapping"]:
            borders.append(_Mark(min(first, reached), max(last, reached)))
            reached = borders[-1].last
        return borders

    def _selected(self, proven: Span, whole: Rendered, marks: _Marks) -> Iterator[Span]:
        """What the marks select of a proven span, with the end token that follows."""
        for mark in marks.marks:
            start, stop = self._tokens_of(mark, proven, whole, marks)
            if start < stop:
                yield Span(start, self._with_end(stop, proven.stop, whole.ids))

    def _tokens_of(self, mark: _Mark, among: Span, whole: Rendered, marks: _Marks, opening: str = "") -> Span:
        """The tokens of a mark. A token that also holds unmarked text rejects the row, unless that is space which the
        assistant writes."""
        inside = [
            index
            for index in range(among.start, among.stop)
            if marks.borders[index].first < mark.last and marks.borders[index].last > mark.first
        ]
        if not inside:
            return Span(0, 0)
        before = whole.text[marks.borders[inside[0]].first : mark.first]
        after = whole.text[mark.last : marks.borders[inside[-1]].last]
        if before.strip() or after.strip() or (before and opening.endswith(before)):
            detail = f"a token crosses a mark: it also holds {excerpt(before or after)}"
            raise RowUnusable(RejectReason.CANNOT_MARK, detail)
        return Span(inside[0], inside[-1] + 1)

    def _with_end(self, end: int, stop: int, ids: list[int]) -> int:
        """`end`, or the index after the end token that follows with at most spaces between."""
        for index in range(end, stop):
            if ids[index] in self.end_token_ids:
                return index + 1
            if self._turns.decoded(ids[index : index + 1]).strip():
                break
        return end

    def _marked_spans(
        self, chat: Conversation, turn: int, whole: Rendered, marks: _Marks, error: TemplateCannotMark
    ) -> Iterator[Span]:
        """Marked tokens of a turn that has no proof without marks. Raises `error` if there are none."""
        owned = [mark for owner, mark in self._owned(chat, whole.text, marks.marks) if owner == turn]
        if not owned:
            raise error
        opening = self._own_text_and_openings(chat, turn)[1][0]
        for mark in owned:
            start, stop = self._tokens_of(mark, Span(0, len(whole.ids)), whole, marks, opening)
            ends = (index + 1 for index in range(start, stop) if whole.ids[index] in self.end_token_ids)
            yield Span(start, self._with_end(next(ends, stop), len(whole.ids), whole.ids))

    def _owned(self, chat: Conversation, text: str, marks: list[_Mark]) -> Iterator[tuple[int, _Mark]]:
        """Each mark with its turn, without what the prompt already holds.

        Marks belong to turns in their order. Each must be text of its turn as the template renders it before the later
        messages are there, so that it holds no word of them.
        """
        owners = iter(_assistant_turns(chat))
        owner, reached, own = -1, 0, ""
        openings: tuple[str, ...] = ()
        for whole_mark in marks:
            while True:
                mark = _without_opening(text, whole_mark, openings)
                place = own.find(text[mark.first : mark.last], reached)
                if owner >= 0 and place >= 0:
                    break
                owner, reached = next(owners, -1), 0
                if owner < 0:
                    found = f"a mark around {excerpt(text[mark.first : mark.last])}, which no assistant's turn holds"
                    raise self._cannot_mark(found)
                own, openings = self._own_text_and_openings(chat, owner)
            reached = place + mark.last - mark.first
            if mark.first < mark.last:
                yield owner, mark

    def _own_text_and_openings(self, chat: Conversation, turn: int) -> tuple[str, tuple[str, ...]]:
        """What a turn adds to the text before it, and what the prompt adds: as a whole, and without thinking."""
        prompt = self._turns.rendered(chat.messages[:turn], chat, prompted=True).text
        history = self._turns.rendered(chat.messages[:turn], chat).text
        alone = self._turns.rendered(chat.messages[: turn + 1], chat).text
        begin = common(history, prompt)
        opening = prompt[begin:]
        return alone[min(begin, common(history, alone)) :], (opening, opening.partition("<think>")[0])

    def _cannot_mark(self, found: str) -> TemplateCannotMark:
        marks = "correct the marks" if self._template.has_marks else "add {% generation %} marks to a copy"
        settings = "all" if self._loss_on == "last_turn" else "last_turn or all"
        return TemplateCannotMark(
            self._template.name,
            found=found,
            wanted=f"a template that shows which tokens are the assistant's, because source.loss_on is {self._loss_on}",
            fix=f"set source.loss_on to {settings}, or {marks} of the template and set source.chat_template to it; see "
            "examples/ for {% generation %} marks",
        )


class RenderedChat(NamedTuple):
    """A chat in the form that its template renders, its token ids and their loss mask; a prompt has no mask."""

    chat: Conversation
    token_ids: list[int]
    loss_mask: list[bool] | None


class ChatSide:
    """One template with its loss mask. `stops`: tokens at which the teacher stops."""

    def __init__(self, template: ChatTemplate, *, loss_on: str, stops: Iterable[int]):
        self.template = template
        self._loss_on, self._loss_mask = loss_on, LossMask(template, loss_on, stops)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn."""
        return self._loss_mask.end_token_ids

    def rendered(
        self, chat: Conversation, *, answered: bool, most: int | None = None, until: int | None = None
    ) -> RenderedChat:
        """A whole chat of at most `most` tokens, or, if it is not `answered`, a prompt. The mask may end at `until`.

        Raises `RowUnusable`, `TemplateCannotMark`.
        """
        if not answered:
            chat = _whole(self.template.fitted(chat, prompted=True))
            return RenderedChat(chat, self.template.prompt(chat), None)
        learned = chat.learned_reasoning(last_turn=self._loss_on == "last_turn")
        chat = _whole(self.template.fitted(chat, learned=learned))
        return RenderedChat(chat, *self._loss_mask.ids_and_loss_mask(chat, most=most, until=until))


def _whole(fitted: Fitted) -> Conversation:
    """A chat of which the template drops nothing. Raises `RowUnusable`."""
    if not fitted.lost:
        return fitted.chat
    named = "; ".join(part.what for part in fitted.lost[:_MAX_LOST])
    more = len(fitted.lost) - _MAX_LOST
    detail = f"{named}; and {more} more" if more > 0 else named
    raise RowUnusable(RejectReason.TEMPLATE_DROPS, detail, lost=frozenset(part.kind for part in fitted.lost))


def _assistant_turns(chat: Conversation) -> list[int]:
    return [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _without_opening(text: str, mark: _Mark, openings: Sequence[str]) -> _Mark:
    """A mark without the part of it that the generation prompt already holds.

    `openings`: what the prompt may add to the history, longest first.
    """
    for opening in filter(None, openings):
        for start in range(mark.first, max(-1, mark.first - len(opening)), -1):
            if text.startswith(opening, start) and start + len(opening) > mark.first:
                return _Mark(min(mark.last, start + len(opening)), mark.last)
    return mark


def _visible_tag(tag: re.Match[str]) -> str:
    """A block that writes the private character of a tag, and removes the same white space beside it."""
    before, is_end, after = tag.groups()
    return f"{{%{before} if true %}}{_CLOSE if is_end else _OPEN}{{% endif {after}%}}"
