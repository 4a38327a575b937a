"""Renders the chats of one reader of a row: the student, or a teacher that reads another prompt.

Shape letters: `T` tokens. Token ids and loss masks are lists of length T.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coldstill.pipeline.reject_reasons import RejectReason

from .chat_template import ChatTemplate, Fitted
from .conversation import Conversation, RowUnusable
from .loss_mask import LossMask

_MAX_LOST = 3
"""Maximum number of dropped parts that a reject names."""


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

    def rendered(self, chat: Conversation, *, answered: bool) -> RenderedChat:
        """A whole chat, or, if it is not `answered`, a prompt. Raises `RowUnusable`, `TemplateCannotMark`."""
        if not answered:
            chat = _whole(self.template.fitted(chat, prompted=True))
            return RenderedChat(chat, self.template.prompt(chat), None)
        learned = chat.learned_reasoning(last_turn=self._loss_on == "last_turn")
        chat = _whole(self.template.fitted(chat, learned=learned))
        return RenderedChat(chat, *self._loss_mask.ids_and_loss_mask(chat))


def _whole(fitted: Fitted) -> Conversation:
    """A chat of which the template drops nothing. Raises `RowUnusable`."""
    if not fitted.lost:
        return fitted.chat
    named = "; ".join(part.what for part in fitted.lost[:_MAX_LOST])
    more = len(fitted.lost) - _MAX_LOST
    detail = f"{named}; and {more} more" if more > 0 else named
    raise RowUnusable(RejectReason.TEMPLATE_DROPS, detail, lost=frozenset(part.kind for part in fitted.lost))
