"""Renders a chat with the tokenizer's chat template, as text or as token ids.

Shape letters: `T` tokens. Token ids are lists of length T.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from coldstill.pipeline.config import SourceConfig
from coldstill.pipeline.errors import SourceNotFound, TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason

from .conversation import Conversation, RowUnusable

# The tag with which a template marks the assistant's tokens; the same pattern as in transformers' tokenizer code.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template, or the one that the settings name instead."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig):
        self.tokenizer, self._source = tokenizer, source
        self.text = _text(tokenizer, source)
        self.has_marks = bool(self.text and _GENERATION_TAG.search(self.text))
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

    def changed(self, *, text: str | None = None, arguments: dict[str, Any] | None = None) -> ChatTemplate:
        """A copy with another text, or with some other template arguments."""
        other = copy.copy(self)
        other.text = text or self.text
        merged = {**self._source.template_arguments, **(arguments or {})}
        other._source = self._source.model_copy(update={"template_arguments": merged})
        return other

    def prompt(self, chat: Conversation) -> list[int]:
        """Token ids of a chat up to the start of the assistant's next turn. Raises `RowUnusable`."""
        return self.ids(chat.messages, chat, prompted=True)

    def ids(self, messages: list[dict[str, Any]], chat: Conversation, *, prompted: bool = False) -> list[int]:
        """Token ids of `messages` of a chat; `prompted`: followed by the start of an assistant turn."""
        encoded = self.apply(messages, chat, tokenize=True, return_dict=True, add_generation_prompt=prompted)
        return list(encoded["input_ids"])

    def render(self, messages: list[dict[str, Any]], chat: Conversation, *, prompted: bool = False) -> str:
        """The text whose token ids `ids` gives."""
        return str(self.apply(messages, chat, tokenize=False, add_generation_prompt=prompted))

    def apply(self, messages: list[dict[str, Any]], chat: Conversation, **options: Any) -> Any:
        """What transformers' `apply_chat_template` returns. Raises `RowUnusable`."""
        self.require()
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=chat.tools, chat_template=self.text, **self._source.template_arguments, **options
            )
        except Exception as error:  # a template is a program, and may raise any exception
            raise RowUnusable(RejectReason.TEMPLATE_FAILED, f"{type(error).__name__}: {error}") from None


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
