"""Reads the chat of a source row: its messages and tools, from whatever columns hold them.

A chat is in a column of messages, or in a prompt and its response. If the settings leave the columns at their defaults,
rows in the layouts of well-known data sets are recognized by their columns too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.source_config import SourceConfig

from .files import lone_surrogate

Columns = dict[str, Any]
_ROLES = {"system", "developer", "user", "assistant", "tool"}
IMAGE_TYPES = ("image", "image_url")
MARK = "<image>"
"""Stands in a text where an image of the row's column belongs, as in LLaVA's data."""
_MAX_DEPTH = 128
"""Levels of a message or of the tools. Copies and templates recurse, and Python's stack ends at about 500 levels."""
_SYNONYMS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
_SHAREGPT_ROLES = dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool")
_SHAREGPT_CALLS = ("function_call", "tool_call")


class RowUnusable(Exception):
    """A row cannot become a sequence. The reason is counted; the detail explains it.

    `lost`: the kinds of parts that the chat template leaves out.
    """

    def __init__(self, reason: RejectReason, detail: str, *, lost: frozenset[str] = frozenset()):
        self.reason, self.detail, self.lost = reason, detail, lost
        super().__init__(f"{reason}: {detail}")


class Conversation(NamedTuple):
    """Messages, and the tools that the assistant may call; `columns` are those that they were read from.

    `layout`: how the columns were read, for a row whose layout was recognized. `images`: the bytes or places of the
    chat's images, one for each content part `{type: image}` in order; see `image_parts.py`.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    columns: tuple[str, ...]
    layout: str = ""
    images: tuple[bytes | str, ...] = ()

    def is_learned(self, number: int) -> bool:
        """Whether the tokens of a message may be targets: an assistant's, unless it has the weight 0."""
        message = self.messages[number]
        return bool(message["role"] == "assistant" and message.get("weight", 1) != 0)

    def learned_reasoning(self, *, last_turn: bool) -> frozenset[int]:
        """Numbers of the messages whose reasoning is learned: those after the last question.

        Families that think drop the reasoning of earlier turns, and their teachers were trained so.
        """
        questions = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        start = questions[-1] + 1 if questions else 0
        learned = [number for number in range(start, len(self.messages)) if self.is_learned(number)]
        return frozenset(learned[-1:] if last_turn else learned)

    def first_learned(self, *, last_turn: bool) -> int:
        """Number of the first message whose tokens are targets; the number of messages if there is none.

        `last_turn`: only the last of the assistant's turns may be learned.
        """
        turns = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        learned = filter(self.is_learned, turns[-1:] if last_turn else turns)
        return next(learned, len(self.messages))


class _Layout(NamedTuple):
    """Messages as a row holds them, the columns that they come from, and the name of the layout."""

    messages: list[Any]
    columns: tuple[str, ...]
    name: str = ""


def conversation_of(
    columns: Columns, source: SourceConfig, *, answered: bool, with_images: bool = False
) -> Conversation | None:
    """The chat of a row, None for a row without one.

    `answered`: with the answer to the prompt; otherwise without the assistant messages at the end. `with_images`: parts
    of content may be images; they stay as they are. Raises `RowUnusable`.
    """
    layout = _layout_of(columns, source, answered=answered)
    if layout is None:
        return None
    tools = _tools(columns.get(source.tools))
    messages = [
        _message(number, message, tools, with_images=with_images) for number, message in enumerate(layout.messages)
    ]
    if not messages:
        raise RowUnusable(RejectReason.BAD_MESSAGES, "there is no message")
    if not answered:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise RowUnusable(RejectReason.NO_PROMPT, "all messages are the assistant's")
    name = layout.name and f"{layout.name}: {', '.join(layout.columns)} -> messages"
    return Conversation(messages, tools, (*layout.columns, source.tools), name)


def turns_of(prompt: object, tools: list[Any] | None, *, with_images: bool) -> list[dict[str, Any]]:
    """The messages of a prompt, as text or as messages. Raises `RowUnusable`."""
    return [
        _message(number, message, tools, with_images=with_images)
        for number, message in enumerate(_turn(prompt, role="user"))
    ]


def has_marks(chat: Conversation) -> bool:
    """Whether a text of the chat has a mark where an image belongs."""
    contents = [message["content"] for message in chat.messages]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return any(MARK in text for text in texts if isinstance(text, str))


def is_image_part(part: object) -> bool:
    """Whether a part of a message's content is an image; `type` may be missing."""
    if not isinstance(part, dict):
        return False
    type_ = part.get("type") or next((name for name in IMAGE_TYPES if part.get(name)), None)
    return type_ in IMAGE_TYPES


def _layout_of(columns: Columns, source: SourceConfig, *, answered: bool) -> _Layout | None:
    """Where the messages of a row are: in the columns of the settings, or else in those of a known layout."""
    if columns.get(source.messages):
        messages = _listed(columns[source.messages])
        first = messages[0] if messages else None
        is_sharegpt = isinstance(first, dict) and "role" not in first and "from" in first
        return _Layout(messages, (source.messages,), "ShareGPT" if is_sharegpt else "")
    has_prompt = bool(columns.get(source.prompt))
    if has_prompt and columns.get(source.response):
        return _turns(columns, source.prompt, source.response, answered=answered)
    if all(getattr(source, name) == SourceConfig.model_fields[name].default for name in _CHAT_SETTINGS):
        for read in _LAYOUTS:
            if layout := read(columns, answered):
                return layout
    if has_prompt and not (answered and columns.get(source.text)):
        return _turns(columns, source.prompt, source.response, answered=answered)
    return None


_CHAT_SETTINGS = ("messages", "prompt", "response", "text")


def _turns(columns: Columns, prompt: str, response: str, *, answered: bool, name: str = "") -> _Layout:
    messages = _turn(columns[prompt], role="user")
    if answered:
        if not columns.get(response):
            detail = f"column {response!r} is empty, {prompt!r} is not"
            raise RowUnusable(RejectReason.NO_RESPONSE, detail)
        messages = messages + _turn(columns[response], role="assistant")
    return _Layout(messages, (prompt, response), name)


def _sharegpt(columns: Columns, answered: bool) -> _Layout | None:
    """`conversations`: [{from: human, value: ...}, ...], with an optional column `system`."""
    for column in ("conversations", "conversation"):
        messages = columns.get(column)
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            name = "ShareGPT" if "from" in messages[0] else "a chat"
            return _with_system(_Layout(messages, (column,), name), columns)
    return None


def _cauldron(columns: Columns, answered: bool) -> _Layout | None:
    """`texts`: [{user: ..., assistant: ...}, ...], of The Cauldron and FineVision."""
    pairs = columns.get("texts")
    if not isinstance(pairs, list) or not pairs or not all(_is_pair(pair) for pair in pairs):
        return None
    messages = [{"role": role, "content": pair[role]} for pair in pairs for role in ("user", "assistant")]
    return _with_system(_Layout(messages, ("texts",), "The Cauldron"), columns)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, dict) and all(isinstance(pair.get(role), str) for role in ("user", "assistant"))


def _preference(columns: Columns, answered: bool) -> _Layout | None:
    """`chosen` and `rejected`, as whole chats or as answers to `prompt`; the chosen one is read."""
    chosen, prompt = columns.get("chosen"), columns.get("prompt")
    if not chosen or "rejected" not in columns or not (prompt or isinstance(chosen, list)):
        return None
    name, used = "preference pairs, the chosen answer", ("prompt", "chosen", "rejected")
    if not prompt or (isinstance(chosen, list) and any(_role_of(message) == "user" for message in chosen)):
        return _Layout(_listed(chosen), used if "prompt" in columns else used[1:], name)
    return _turns(columns, "prompt", "chosen", answered=answered, name=name)._replace(columns=used)


def _trl(columns: Columns, answered: bool) -> _Layout | None:
    """`prompt` and `completion`, as text or messages."""
    if not columns.get("prompt") or "completion" not in columns:
        return None
    return _turns(columns, "prompt", "completion", answered=answered, name="prompt and completion")


def _alpaca(columns: Columns, answered: bool) -> _Layout | None:
    """`instruction`, an optional `input`, and `output`; `context` and `response` in some data sets."""
    instruction = columns.get("instruction")
    given = next((name for name in ("input", "context") if name in columns), None)
    answer = next((name for name in ("output", "response") if name in columns), None)
    if not isinstance(instruction, str) or not instruction or (answer is None and (answered or given is None)):
        return None
    used = tuple(name for name in ("instruction", given, answer) if name)
    details = columns.get(given) if given else None
    question = f"{instruction}\n{details}" if details else instruction
    layout = _turns(
        {"instruction": question, "answer": columns.get(answer) if answer else None},
        "instruction",
        "answer",
        answered=answered,
    )
    if earlier := _history(columns.get("history")):
        used = (*used, "history")
    return _with_system(_Layout(earlier + layout.messages, used, "alpaca"), columns)


def _history(pairs: object) -> list[dict[str, Any]]:
    """The turns before an alpaca row's own: pairs of a question and its answer. Raises `RowUnusable`."""
    if isinstance(pairs, str) and pairs.lstrip().startswith("["):
        pairs = _parsed(pairs, RejectReason.BAD_MESSAGES, "the pairs in column 'history'")
    listed = pairs or []
    if not isinstance(listed, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in listed):
        raise RowUnusable(RejectReason.BAD_MESSAGES, "column 'history' holds no pairs of a question and its answer")
    return [
        {"role": role, "content": text}
        for pair in listed
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


_LAYOUTS: tuple[Callable[[Columns, bool], _Layout | None], ...] = (_sharegpt, _cauldron, _preference, _trl, _alpaca)


def _with_system(layout: _Layout, columns: Columns) -> _Layout:
    system = columns.get("system")
    if not isinstance(system, str) or not system.strip() or _role_of(layout.messages[0]) == "system":
        return layout
    messages = [{"role": "system", "content": system}, *layout.messages]
    return layout._replace(messages=messages, columns=("system", *layout.columns))


def _role_of(message: object) -> str:
    """A role by its usual name; empty if there is none."""
    if not isinstance(message, dict):
        return ""
    is_sharegpt = not isinstance(message.get("role"), str)
    given = message.get("from") if is_sharegpt else message["role"]
    if not isinstance(given, str):
        return ""
    plain = given.strip().lower().replace("-", "_")
    if is_sharegpt and plain in _SHAREGPT_ROLES:
        return _SHAREGPT_ROLES[plain]
    if plain in _ROLES:
        return plain
    # A template may have a role of its own, so that other names stay as they are.
    return _SYNONYMS.get(plain, plain if is_sharegpt else given)


def _turn(value: object, *, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _listed(value)


def _listed(messages: object) -> list[Any]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _parsed(messages, RejectReason.BAD_MESSAGES, "messages")
    if not isinstance(messages, list):
        raise RowUnusable(RejectReason.BAD_MESSAGES, f"messages are {type(messages).__name__}, not a list")
    return messages


def _message(number: int, message: object, tools: list[Any] | None, *, with_images: bool) -> dict[str, Any]:
    """A message without null fields, which typed columns add because other messages have those fields."""
    bad = RejectReason.BAD_MESSAGES
    role = _role_of(message)
    if not role or not isinstance(message, dict):
        raise RowUnusable(bad, f"message {number} has no role")
    _require_shallow(message, bad, f"message {number}")
    fields = {name: value for name, value in message.items() if value is not None}
    is_sharegpt = "role" not in fields
    fields.pop("from", None)
    content = fields.pop("value", None) if "content" not in fields and "value" in fields else fields.get("content")
    if is_sharegpt and role in _SHAREGPT_CALLS:
        role, fields["tool_calls"], content = "assistant", _parsed(content, bad, f"the call in message {number}"), None
    if isinstance(legacy := fields.get("function_call"), dict) and role == "assistant":
        del fields["function_call"]
        fields["tool_calls"] = [{"type": "function", "function": legacy}]
    calls = _calls(number, fields.pop("tool_calls", None), tools)
    if not isinstance(content, str | list) and not (content is None and calls):
        raise RowUnusable(bad, f"content of message {number} is {type(content).__name__}, neither text nor parts")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if with_images and is_image_part(part):
            continue
        if not isinstance(part, str) and not (
            isinstance(part, dict)
            # A role of the template's own may have parts of its own.
            and (role not in _ROLES or isinstance(part.get("text"), str) or isinstance(part.get("thinking"), str))
        ):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            captured = "text and images are" if with_images else "text is"
            raise RowUnusable(bad, f"part {index} of message {number} is of type {kind}: only {captured} captured")
    return {**fields, "role": role, "content": content} | ({"tool_calls": calls} if calls else {})


def _calls(number: int, calls: object, tools: list[Any] | None) -> list[dict[str, Any]]:
    """The tool calls of a message, each with a name and arguments that are an object or its JSON text."""
    bad = RejectReason.BAD_MESSAGES
    if isinstance(calls, str) and calls.strip():
        calls = _parsed(calls, bad, f"the calls in message {number}")
    listed = [calls] if isinstance(calls, dict) else calls or []
    checked = []
    for index, call in enumerate(listed if isinstance(listed, list) else [listed]):
        what = f"call {index} of message {number}"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowUnusable(bad, f"{what} has no function name")
        arguments = function.get("arguments") or {}
        value = _parsed(arguments, bad, f"arguments of {what}") if isinstance(arguments, str) else arguments
        if not isinstance(value, dict):
            raise RowUnusable(bad, f"arguments of {what} are {type(value).__name__}, not an object")
        if isinstance(arguments, dict):  # of a typed column, which may have dates: strings, as in metadata
            arguments = json.loads(json.dumps(_declared(arguments, function["name"], tools), default=str))
        function = {**function, "arguments": arguments}
        checked.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return checked


def _declared(arguments: dict[str, Any], name: str, tools: list[Any] | None) -> dict[str, Any]:
    """Arguments without null values that the tool does not declare.

    A typed column has the arguments of all tools in each call. A null value of a declared argument may be meant.
    """
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        parameters = function.get("parameters") if isinstance(function, dict) else None
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict) and isinstance(function, dict) and function.get("name") == name:
            return {key: value for key, value in arguments.items() if value is not None or key in properties}
    return arguments


def _tools(tools: object) -> list[Any] | None:
    """Tools as a list; many datasets store them as JSON text."""
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, RejectReason.BAD_TOOLS, "tools")
    if tools and not isinstance(tools, list):
        raise RowUnusable(RejectReason.BAD_TOOLS, f"tools are {type(tools).__name__}, not a list")
    _require_shallow(tools, RejectReason.BAD_TOOLS, "the list of tools")
    return tools or None  # type: ignore[return-value]


def _parsed(text: object, reason: RejectReason, what: str) -> object:
    try:
        value = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise RowUnusable(reason, f"{what} are not JSON: {error}") from None
    if "\\u" in str(text) and (problem := lone_surrogate(value)):
        raise RowUnusable(RejectReason.LONE_SURROGATE, f"{what}: {problem}")
    _require_shallow(value, reason, f"the JSON of {what}")
    return value


def _require_shallow(value: object, reason: RejectReason, what: str) -> None:
    """Raise `RowUnusable` for a value that is nested deeper than `_MAX_DEPTH`."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RowUnusable(reason, f"{what} is nested deeper than {_MAX_DEPTH} levels")
