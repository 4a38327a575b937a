"""Renders a chat with a template that marks the assistant's text, and says where the marks are.

transformers' own masks lose tokens where a mark ends in token 0, in white space, or inside a character of several
tokens. Here the marks are characters in the rendered text, put there by the template itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from coldstill.pipeline.errors import TemplateCannotMark

from .chat_template import ChatTemplate
from .conversation import Conversation

_OPEN, _CLOSE = "\U000f1de0", "\U000f1de1"
"""Private characters that stand for the two tags in the rendered text."""
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class Mark(NamedTuple):
    """Characters `[first, last)` of a rendered chat."""

    first: int
    last: int


class MarkedTemplate:
    """A template with {% generation %} marks around the assistant's text."""

    def __init__(self, template: ChatTemplate):
        # Whether a tag removes the spaces and the line end beside it depends on its kind: these are block tags as well.
        self._template = template.changed(text=_TAG.sub(_visible_tag, template.text or ""))

    def render(self, chat: Conversation) -> tuple[str, list[Mark]]:
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
                marks.append(Mark(length, length + len(part)))
            length += len(part)
        return "".join(parts[::2]), marks


def without_opening(text: str, mark: Mark, openings: Sequence[str]) -> Mark:
    """A mark without the part of it that the generation prompt already holds.

    `openings`: what the prompt may add to the history, longest first.
    """
    for opening in filter(None, openings):
        for start in range(mark.first, max(-1, mark.first - len(opening)), -1):
            if text.startswith(opening, start) and start + len(opening) > mark.first:
                return Mark(min(mark.last, start + len(opening)), mark.last)
    return mark


def _visible_tag(tag: re.Match[str]) -> str:
    """A block that writes the private character of a tag, and removes the same white space beside it."""
    before, is_end, after = tag.groups()
    return f"{{%{before} if true %}}{_CLOSE if is_end else _OPEN}{{% endif {after}%}}"
