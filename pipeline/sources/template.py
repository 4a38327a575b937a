"""The chat template: messages in, token ids and the mask of what is learned out.

Where the template marks the assistant's tokens ({% generation %}), one call gives both. Where it does not, the mask is
proven: what the teacher was shown before each of its turns must be, token by token, how the whole begins.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from coldstill.pipeline.config import SourceConfig
from coldstill.pipeline.errors import SourceNotFound, TemplateCannotMark

from .conversations import Conversation, RowUnusable

# The tag by which a template marks the assistant's tokens; the same test as in transformers' own tokenizer code.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template, or the one that the settings put in its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig):
        self._tokenizer, self._source = tokenizer, source
        self.text = _text(tokenizer, source)
        self._has_marks = bool(self.text and _GENERATION_TAG.search(self.text))
        self.name = source.chat_template or f"chat template of {tokenizer.name_or_path}"

    @property
    def sha256(self) -> str | None:
        """Digest of the template and of the variables that it is given."""
        if not self.text:
            return None
        arguments = self._source.template_arguments
        said = f"{self.text}\n{json.dumps(arguments, sort_keys=True, default=str)}" if arguments else self.text
        return hashlib.sha256(said.encode()).hexdigest()

    def require(self) -> None:
        """Raise `TemplateCannotMark` where there is no template."""
        if not self.text:
            raise TemplateCannotMark(
                self.name, found="no chat template", wanted="one", fix="set source.chat_template to a Jinja file"
            )

    def prompt(self, chat: Conversation) -> list[int]:
        """Token ids of a chat up to where the assistant speaks."""
        return self._ids(chat.messages, chat, prompted=True)

    def learned(self, chat: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them are learned.

        Raises `TemplateCannotMark` where the template gives no mask, `RowUnusable` where the words of one row do not.
        """
        if self._source.loss_on == "all":
            token_ids = self._ids(chat.messages, chat)
            return token_ids, [True] * len(token_ids)
        if not self._has_marks:
            token_ids = self._ids(chat.messages, chat)
            return token_ids, self._proven(chat, token_ids)
        encoded = self._apply(chat.messages, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        learned = [bool(bit) for bit in encoded["assistant_masks"]]
        return list(encoded["input_ids"]), _last_turn(learned) if self._source.loss_on == "last_turn" else learned

    def _proven(self, chat: Conversation, token_ids: list[int]) -> list[bool]:
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self._source.loss_on == "last_turn":
            turns = turns[-1:]
        learned = [False] * len(token_ids)
        for turn in turns:
            shown = self._ids(chat.messages[:turn], chat, prompted=True)
            self._require_prefix(chat, turn, shown, token_ids)
            stop = self._end_of(chat, turn, len(shown), token_ids)
            learned[len(shown) : stop] = [True] * (stop - len(shown))
        return learned

    def _require_prefix(self, chat: Conversation, turn: int, shown: list[int], token_ids: list[int]) -> None:
        """What the teacher is shown before a turn must be how the whole begins."""
        if shown == token_ids[: len(shown)]:
            return
        before, whole = self._render(chat.messages[:turn], chat, prompted=True), self._render(chat.messages, chat)
        if whole.startswith(before):
            raise RowUnusable("cannot_mark", f"a token crosses the border between message {turn} and what precedes it")
        raise self._cannot_mark(f"what precedes message {turn}, an assistant's, is rewritten once more messages follow")

    def _end_of(self, chat: Conversation, turn: int, start: int, token_ids: list[int]) -> int:
        """Where a turn's tokens end, when they begin at `start`: with its last end-of-sequence token, where the teacher
        stops, or with the last token of the turn where it has none."""
        until = self._ids(chat.messages[: turn + 1], chat) if turn + 1 < len(chat.messages) else token_ids
        end = self._tokenizer.eos_token_id
        if until == token_ids[: len(until)]:
            if len(until) <= start:
                raise self._cannot_mark(f"message {turn}, an assistant's, adds no token to what precedes it")
            ends = [index for index in range(start, len(until)) if token_ids[index] == end]
            return ends[-1] + 1 if ends else len(until)
        # The turn is shown otherwise once more messages follow, without its thinking for instance. Of what is shown now
        # it must be certain that it is the turn's own words to their end.
        stop = token_ids.index(end, start) if end in token_ids[start:] else start
        said = self._tokenizer.decode(token_ids[start:stop], clean_up_tokenization_spaces=False).strip()
        content = chat.messages[turn]["content"]
        if said and isinstance(content, str) and content.strip().endswith(said):
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
        except Exception as error:  # a template is a program of its own and may raise anything
            raise RowUnusable("template_failed", f"{type(error).__name__}: {error}") from None

    def _cannot_mark(self, found: str) -> TemplateCannotMark:
        return TemplateCannotMark(
            self.name,
            found=found,
            wanted=f"marks round the assistant's tokens, because source.loss_on is {self._source.loss_on}",
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


def _last_turn(learned: list[bool]) -> list[bool]:
    """Only the last run of learned tokens."""
    stop = len(learned) - learned[::-1].index(True) if True in learned else 0
    start = stop
    while start and learned[start - 1]:
        start -= 1
    return [start <= index < stop for index in range(len(learned))]
