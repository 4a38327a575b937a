"""Renders a chat with the chat template of the tokenizer or processor, as text or as token ids.

Templates differ in the form that they read: content as text or as parts, arguments of calls as values or as JSON text.
`fitted` finds the form of a chat of which the template drops nothing, beginning with the one in which vLLM's server
passes it.

Shape letters: `T` tokens. Token ids are lists of length T.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from coldstill.common.processor import placeholder_id
from coldstill.common.template_limits import limited
from coldstill.pipeline.errors import SourceNotFound, TemplateCannotMark
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.source_config import SourceConfig

from .conversation import Conversation, RowUnusable, is_image_part
from .kept_text import REASONING_FIELDS, Lost, lost_parts

# The tag with which a template marks the assistant's tokens; the same pattern as in transformers' tokenizer code.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Fitted(NamedTuple):
    """A chat in the form in which the template drops least, and what it drops then."""

    chat: Conversation
    lost: tuple[Lost, ...]


class ChatTemplate:
    """The chat template of a tokenizer, or the one that the settings name instead.

    `today`: the date of a template that asks for one, unless the settings give it; by default the clock's.
    `processor`: that of a model that sees images, whose template counts if it has one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: SourceConfig,
        *,
        today: date | None = None,
        processor: Any | None = None,
    ):
        self.tokenizer, self._source = tokenizer, source
        self.text = _text(tokenizer, source, processor)
        self.placeholder = None if processor is None else tokenizer.convert_ids_to_tokens(placeholder_id(processor))
        self.date = (source.template_date or today) if self._asks_for_date else None
        self.has_marks = bool(self.text and _GENERATION_TAG.search(self.text))
        self.name = source.chat_template or f"chat template of {tokenizer.name_or_path}"

    @property
    def sha256(self) -> str | None:
        """Digest of the template, of its arguments and of its date."""
        if not self.text:
            return None
        arguments = self._source.template_arguments
        said = f"{self.text}\n{json.dumps(arguments, sort_keys=True, default=str)}" if arguments else self.text
        if self.date:
            said += f"\ndate {self.date}\n"
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def _asks_for_date(self) -> bool:
        """Whether today's date may be in the rendered text. `date_string` is the usual argument instead of it."""
        return "strftime_now" in (self.text or "") and "date_string" not in self._source.template_arguments

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

    def fitted(self, chat: Conversation, *, prompted: bool = False, learned: Collection[int] = ()) -> Fitted:
        """The form of a chat that the template renders best. Raises `RowUnusable` if it renders none.

        `prompted`: followed by the start of an assistant turn; `learned`: numbers of the messages whose reasoning must
        stand in the text. Parts that `source.may_drop` lists are not reported.
        """
        self.require()
        best: Fitted | None = None
        problem: RowUnusable | None = None
        for form in self._forms_of(chat):
            try:
                lost = self._lost(form, prompted=prompted, learned=learned)
            except RowUnusable as error:
                problem = problem or error
                continue
            if best is None or len(lost) < len(best.lost):
                best = Fitted(form, lost)
            if not lost:
                break
        if best is None:
            assert problem is not None
            raise problem
        return best

    def _lost(self, chat: Conversation, *, prompted: bool, learned: Collection[int]) -> tuple[Lost, ...]:
        def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
            return self.render(messages, chat._replace(tools=tools), prompted=prompted)

        text = self.render(chat.messages, chat, prompted=prompted)
        lost = lost_parts(
            chat.messages, chat.tools, render=render, text=text, learned=learned, placeholder=self.placeholder
        )
        return tuple(part for part in lost if part.kind not in self._source.may_drop)

    def _forms_of(self, chat: Conversation) -> Iterator[Conversation]:
        """The forms in which a chat may be rendered, as vLLM would first. Most chats have one."""
        messages = [self._with_known_fields(message) for message in chat.messages]
        if any(message["role"] == "developer" for message in messages) and not self._mentions("developer"):
            messages = _developer_as_system(messages)
        has_parts = any(isinstance(message["content"], list) for message in messages)
        has_calls = any(message.get("tool_calls") for message in messages)
        has_null = any(map(_is_empty, messages))
        for as_text, null, joined in itertools.product(
            (False, True) if has_calls else (False,),
            ("", None) if has_null else (None,),
            ((False, True) if self._reads_parts else (True,)) if has_parts else (False,),
        ):
            formed = [_in_form(message, as_text=as_text, null=null, joined=joined) for message in messages]
            yield chat._replace(messages=formed)
            if self.sees_images and any(isinstance(message["content"], str) for message in formed):
                yield chat._replace(messages=_as_parts(formed))

    @property
    def sees_images(self) -> bool:
        """Whether the template is that of a model that sees images."""
        return self.placeholder is not None

    def readable(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose content is text, as parts if the template reads nothing else."""
        return messages if self._reads_text else _as_parts(messages)

    @cached_property
    def _reads_text(self) -> bool:
        """Whether content may be text; some templates of models that see images read parts only."""
        if not self.sees_images:
            return True
        try:
            return "Qz0kX" in self.render([{"role": "user", "content": "Qz0kX"}], Conversation([], None, ()))
        except RowUnusable:
            return False

    def _with_known_fields(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose reasoning is in a field that the template mentions, if it mentions any."""
        known = [field for field in REASONING_FIELDS if self._mentions(field)]
        given = [field for field in REASONING_FIELDS if message.get(field)]
        if not known or not given or any(field in known for field in given):
            return message
        changed = {name: value for name, value in message.items() if name not in given}
        return {**changed, known[0]: message[given[0]]}

    def _mentions(self, name: str) -> bool:
        """Whether the template names a role or a field."""
        return re.search(rf"""(['"]{name}['"]|\.{name}\b)""", self.text or "") is not None

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template shows the text of content that is a list of parts, and not that list as Python does."""
        parts = [{"type": "text", "text": text} for text in ("Qz0kX", "Qz1kX")]
        try:
            text = self.render([{"role": "user", "content": parts}], Conversation([], None, ()))
        except RowUnusable:
            return False
        return all(part["text"] in text for part in parts) and "'type'" not in text

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
        arguments = self._source.template_arguments
        if self.date:  # a variable hides the function of the same name, which reads the clock
            arguments = {"strftime_now": datetime.combine(self.date, time()).strftime, **arguments}
        try:
            with limited(str(self.text), chat_template_utils):
                return self.tokenizer.apply_chat_template(
                    messages, tools=chat.tools, chat_template=self.text, **arguments, **options
                )
        except Exception as error:  # a template is a program, and may raise any exception
            raise RowUnusable(RejectReason.TEMPLATE_FAILED, f"{type(error).__name__}: {error}") from None


def _text(tokenizer: PreTrainedTokenizerBase, source: SourceConfig, processor: Any | None) -> str | None:
    if source.chat_template is None:
        named = getattr(processor, "chat_template", None) or tokenizer.chat_template
        return named.get("default") if isinstance(named, dict) else named
    try:
        return Path(source.chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise SourceNotFound(
            source.chat_template, found=error.strerror, wanted="a Jinja chat template", fix="check source.chat_template"
        ) from None


def _is_empty(message: dict[str, Any]) -> bool:
    """Whether calls stand without text, which some templates want as null and others as empty text."""
    return message["content"] is None or (message["content"] == "" and bool(message.get("tool_calls")))


def _in_form(message: dict[str, Any], *, as_text: bool, null: str | None, joined: bool) -> dict[str, Any]:
    """A message with its arguments as JSON text or as values, `null` for null content, and its parts joined."""
    content = message["content"]
    if _is_empty(message):
        content = null
    elif joined and isinstance(content, list) and not any(map(is_image_part, content)):
        # Joined as by vLLM's server.
        content = "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    changed = {**message, "content": content}
    if message.get("tool_calls"):
        changed["tool_calls"] = [_call_in_form(call, as_text=as_text) for call in message["tool_calls"]]
    return changed


def _as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each text as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def _call_in_form(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = call.get("function", call)
    given = function.get("arguments")
    arguments: object
    if as_text:
        arguments = given if isinstance(given, str) and given.strip() else json.dumps(given or {}, ensure_ascii=False)
    else:
        arguments = json.loads(given) if isinstance(given, str) and given.strip() else given or {}
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


def _developer_as_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one system message at the start, as vLLM's server passes them to a template without the role
    `developer`."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    others = [message for message in messages if message["role"] not in ("system", "developer")]
    if len(system) == 1 and messages[0] is system[0]:
        return [{**system[0], "role": "system"}, *others]
    texts = [_in_form(message, as_text=False, null="", joined=True)["content"] for message in system]
    if any(isinstance(text, list) for text in texts):  # with images
        return [{**message, "role": "system"} if message in system else message for message in messages]
    return [{"role": "system", "content": "\n\n".join(text for text in texts if text)}, *others]
