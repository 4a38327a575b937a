"""Loss mask of a chat: which of its token ids are the assistant's.

If the template marks the assistant's tokens ({% generation %}), one call gives ids and mask. Otherwise the mask is
derived and verified token by token: the ids that the teacher would be shown before an assistant turn must be a prefix
of the ids of the whole chat.

Shape letters: `T` tokens. Token ids and loss masks are lists of length T.
"""

from __future__ import annotations

from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason

from .chat_template import ChatTemplate
from .conversation import Conversation, RowUnusable


class LossMask:
    """Marks the target tokens of chats that one template renders."""

    def __init__(self, template: ChatTemplate, loss_on: str):
        self._template, self._loss_on = template, loss_on

    def ids_and_loss_mask(self, chat: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them are target tokens.

        Raises `TemplateCannotMark` if the template does not determine the mask, `RowUnusable` if it does but this row
        cannot be masked.
        """
        if self._loss_on == "all":
            token_ids = self._template.ids(chat.messages, chat)
            return token_ids, [True] * len(token_ids)
        if not self._template.has_marks:
            token_ids = self._template.ids(chat.messages, chat)
            return token_ids, self._derived_mask(chat, token_ids)
        encoded = self._template.apply(
            chat.messages, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        loss_mask = _without_weight_0(chat, [bool(bit) for bit in encoded["assistant_masks"]])
        return list(encoded["input_ids"]), _last_run(loss_mask) if self._loss_on == "last_turn" else loss_mask

    def _derived_mask(self, chat: Conversation, token_ids: list[int]) -> list[bool]:
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self._loss_on == "last_turn":
            turns = turns[-1:]
        turns = [turn for turn in turns if chat.is_learned(turn)]
        loss_mask = [False] * len(token_ids)
        for turn in turns:
            shown = self._template.ids(chat.messages[:turn], chat, prompted=True)
            self._require_prefix(chat, turn, shown, token_ids)
            stop = self._end_of(chat, turn, len(shown), token_ids)
            loss_mask[len(shown) : stop] = [True] * (stop - len(shown))
        return loss_mask

    def _require_prefix(self, chat: Conversation, turn: int, shown: list[int], token_ids: list[int]) -> None:
        """The ids that the teacher is shown before a turn must be a prefix of the whole chat's."""
        if shown == token_ids[: len(shown)]:
            return
        before, whole = (
            self._template.render(chat.messages[:turn], chat, prompted=True),
            self._template.render(chat.messages, chat),
        )
        if whole.startswith(before):
            detail = f"a token crosses the border between message {turn} and what precedes it"
            raise RowUnusable(RejectReason.CANNOT_MARK, detail)
        raise self._cannot_mark(f"what precedes message {turn}, an assistant's, is rewritten once more messages follow")

    def _end_of(self, chat: Conversation, turn: int, start: int, token_ids: list[int]) -> int:
        """Index after the tokens of a turn that begins at `start`.

        The turn ends with its last end-of-sequence token, at which the teacher stops, or else with its last token.
        """
        until = self._template.ids(chat.messages[: turn + 1], chat) if turn + 1 < len(chat.messages) else token_ids
        end = self._template.tokenizer.eos_token_id
        if until == token_ids[: len(until)]:
            if len(until) <= start:
                raise self._cannot_mark(f"message {turn}, an assistant's, adds no token to what precedes it")
            ends = [index for index in range(start, len(until)) if token_ids[index] == end]
            return ends[-1] + 1 if ends else len(until)
        # The template changes the turn once more messages follow; for instance it removes the thinking. The tokens that
        # are shown now must then be the end of the turn's own content.
        stop = token_ids.index(end, start) if end in token_ids[start:] else start
        shown = self._template.tokenizer.decode(token_ids[start:stop], clean_up_tokenization_spaces=False).strip()
        content = chat.messages[turn]["content"]
        if shown and isinstance(content, str) and content.strip().endswith(shown):
            return stop + 1
        raise self._cannot_mark(f"message {turn}, an assistant's, is rewritten once more messages follow")

    def _cannot_mark(self, found: str) -> TemplateCannotMark:
        return TemplateCannotMark(
            self._template.name,
            found=found,
            wanted=f"marks around the assistant's tokens, because source.loss_on is {self._loss_on}",
            fix="set source.chat_template to a copy with {% generation %} marks (see examples/), or source.loss_on to "
            "last_turn or all",
        )


def _without_weight_0(chat: Conversation, loss_mask: list[bool]) -> list[bool]:
    """The mask of a template with marks, without the turns of weight 0. Raises `RowUnusable` if turns are not runs."""
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if all(map(chat.is_learned, turns)):
        return loss_mask
    starts = [index for index, bit in enumerate(loss_mask) if bit and not (index and loss_mask[index - 1])]
    if len(starts) != len(turns):
        detail = f"{len(starts)} marked spans for {len(turns)} turns, of which some have the weight 0"
        raise RowUnusable(RejectReason.CANNOT_MARK, detail)
    for start, turn in zip(starts, turns, strict=True):
        while not chat.is_learned(turn) and start < len(loss_mask) and loss_mask[start]:
            loss_mask[start] = False
            start += 1
    return loss_mask


def _last_run(loss_mask: list[bool]) -> list[bool]:
    """The mask with only its last run of target tokens."""
    stop = len(loss_mask) - loss_mask[::-1].index(True) if True in loss_mask else 0
    start = stop
    while start and loss_mask[start - 1]:
        start -= 1
    return [start <= index < stop for index in range(len(loss_mask))]
