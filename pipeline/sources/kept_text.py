"""Finds the parts of a chat that its rendered text does not hold.

A chat template is a program that may leave out whatever it was not written for. Two checks find that:

- Each text must stand in the rendered one, as often as the chat holds it; arguments of a call are compared as values.
- A short text or a name may stand there by chance. So the chat is rendered once more with a marker after each of them,
  and each marker must stand there.

Images all have the same placeholder: there must be one for each, and after each message as many as there are images up
to it. Within a message a template may put the images first, as its teacher was trained.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from .conversation import is_image_part

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TOOL_ROLES = ("tool", "function", "ipython", "tool_results", "observation")
_REASONING_TAG = "think|thinking|thought|reasoning"
_INLINE_REASONING = re.compile(rf"\s*(?:<(?:{_REASONING_TAG})>)?(.*?)</(?:{_REASONING_TAG})>", re.DOTALL)
_SHORT = 24
"""Texts of at most this many characters get a marker."""

Messages = Sequence[dict[str, Any]]


class Lost(NamedTuple):
    """A part that the template leaves out: its kind, as `source.may_drop` names it, and a description."""

    kind: str
    what: str


class _Text(NamedTuple):
    """A text without the white space at its edges: characters `start` to `stop` of a field of a dict."""

    kind: str
    what: str
    holder: dict[str, Any]
    field: str
    start: int
    stop: int

    @property
    def text(self) -> str:
        return str(self.holder[self.field])[self.start : self.stop]


class _Call(NamedTuple):
    """A tool call: the dict with its name and arguments."""

    what: str
    function: dict[str, Any]


def lost_parts(
    messages: Messages,
    tools: Sequence[Any] | None,
    *,
    render: Callable[[list[dict[str, Any]], list[Any] | None], str],
    text: str,
    learned: Collection[int],
    placeholder: str | None = None,
) -> list[Lost]:
    """What of the chat does not stand in `text`, which `render` made from it.

    `learned`: numbers of the messages whose reasoning must stand there; templates leave out that of earlier turns.
    `placeholder`: what stands for an image, which no other text of the chat holds.
    """
    texts = list(_texts_of(messages, learned))
    lost = list(_missing_images(messages, tools, render=render, text=text, placeholder=placeholder or ""))
    lost += _missing_texts(texts, text)
    for call in _calls_of(messages):
        name, arguments = call.function["name"], call.function["arguments"]
        if name not in text or not arguments_stand(arguments, text):
            lost.append(Lost("tool_calls", f"{call.what}: {name}({_shortened(_as_text(arguments))})"))
    known = set(lost)
    lost += [part for part in _missing_markers(messages, tools, learned=learned, render=render) if part not in known]
    return lost


def _missing_images(
    messages: Messages,
    tools: Sequence[Any] | None,
    *,
    render: Callable[[list[dict[str, Any]], list[Any] | None], str],
    text: str,
    placeholder: str,
) -> Iterator[Lost]:
    """Messages whose images are not where they belong; there is at most one, the first."""
    numbers = [_images_in(message) for message in messages]
    reached = 0
    for number, images in enumerate(numbers):
        reached += images
        if not images:
            continue
        found = text.count(placeholder)
        if any(numbers[number + 1 :]):
            try:
                found = render(list(messages[: number + 1]), list(tools) if tools else None).count(placeholder)
            except Exception:  # a template may refuse a chat that ends here; then the count of the whole chat decides
                continue
        if found < reached:
            yield Lost("images", f"{found} of the first {reached} images, to message {number}, are in the text")
            return


def _images_in(message: dict[str, Any]) -> int:
    content = message.get("content")
    return sum(is_image_part(part) for part in content) if isinstance(content, list) else 0


def arguments_stand(arguments: object, text: str) -> bool:
    """Whether the arguments of a call can be read from a rendered text.

    Arguments that were rendered as JSON text must parse back to their value. Given as a value, they may also be in
    another notation, such as XML or Python, which must then hold each name and value.
    """
    is_text = isinstance(arguments, str)
    value = json.loads(str(arguments)) if is_text else arguments
    wanted = _canonical(value)
    if any(_canonical(found) == wanted for found in _objects_in(text)):
        return True
    return not is_text and all(any(form in text for form in forms) for forms in _leaves_of(value))


def _objects_in(text: str) -> Iterator[object]:
    """The JSON objects in a text, inner ones too. One in quotes is the content of a string."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            pass
        else:
            if not (text[start - 1 : start] == text[stop : stop + 1] == '"'):
                yield value
        start = text.find("{", start + 1)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _as_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)


def _leaves_of(value: object) -> Iterator[set[str]]:
    """For each name and each value in arguments, the forms in which it may be written."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield _forms_of(str(name))
            yield from _leaves_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves_of(inner)
    else:
        yield _forms_of(value.strip()) if isinstance(value, str) else {json.dumps(value, default=str), str(value)}


def _forms_of(text: str) -> set[str]:
    """A text as it is, and as it is written in a JSON string."""
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]}


def _texts_of(messages: Messages, learned: Collection[int]) -> Iterator[_Text]:
    for number, message in enumerate(messages):
        kind, content = _kind_of(message), message.get("content")
        wants_reasoning = number in learned
        what = f"{kind.replace('_', ' ')} of message {number}"
        reasoning = f"reasoning of message {number}"
        if isinstance(content, str):
            start = 0
            inline = _INLINE_REASONING.match(content) if message["role"] == "assistant" else None
            if inline:
                start = inline.end()
                if wants_reasoning:
                    yield from _stripped("reasoning", reasoning, message, "content", *inline.span(1))
            yield from _stripped(kind, what, message, "content", start, len(content))
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict):
                continue
            if isinstance(part.get("text"), str):
                yield from _stripped(kind, what, part, "text", 0, len(part["text"]))
            if wants_reasoning and isinstance(part.get("thinking"), str):
                yield from _stripped("reasoning", reasoning, part, "thinking", 0, len(part["thinking"]))
        for field in REASONING_FIELDS if wants_reasoning else ():
            if isinstance(message.get(field), str):
                yield from _stripped("reasoning", reasoning, message, field, 0, len(message[field]))


def _kind_of(message: dict[str, Any]) -> str:
    role = message["role"]
    if role in ("system", "developer"):
        return str(role)
    if role in _TOOL_ROLES:
        return "tool_results"
    return "text_beside_calls" if message.get("tool_calls") else "text"


def _stripped(kind: str, what: str, holder: dict[str, Any], field: str, start: int, stop: int) -> Iterator[_Text]:
    """The text between two places of a field, if it is more than white space."""
    text = holder[field][start:stop]
    if text.strip():
        start += len(text) - len(text.lstrip())
        yield _Text(kind, what, holder, field, start, start + len(text.strip()))


def _calls_of(messages: Messages) -> Iterator[_Call]:
    for number, message in enumerate(messages):
        for index, call in enumerate(message.get("tool_calls") or ()):
            yield _Call(f"call {index} of message {number}", call.get("function", call))


def _missing_texts(texts: Sequence[_Text], rendered: str) -> list[Lost]:
    """Long texts first: a text that another one holds must stand once more than in that one."""
    lost: list[Lost] = []
    kept: list[_Text] = []
    for each in sorted(texts, key=lambda item: item.stop - item.start, reverse=True):
        text = each.text
        needed = 1 + sum(other.text.count(text) for other in kept)
        if sum(map(rendered.count, _forms_of(text))) >= needed or _stands_as_value(text, rendered):
            kept.append(each)
        else:
            lost.append(Lost(each.kind, f"{each.what}: {_shortened(text)!r}"))
    return lost


def _stands_as_value(text: str, rendered: str) -> bool:
    """Whether a text that is JSON stands in the rendered one as the same value, as tool results may."""
    if not text.startswith("{"):
        return False
    try:
        wanted = _canonical(json.loads(text))
    except (ValueError, RecursionError):
        return False
    return any(_canonical(value) == wanted for value in _objects_in(rendered))


def _missing_markers(
    messages: Messages,
    tools: Sequence[Any] | None,
    *,
    learned: Collection[int],
    render: Callable[[list[dict[str, Any]], list[Any] | None], str],
) -> list[Lost]:
    changed, tools = copy.deepcopy(list(messages)), copy.deepcopy(list(tools)) if tools else None
    markers: list[tuple[str, Lost]] = []

    def marker(kind: str, what: str) -> str:
        markers.append((f"Qz{len(markers)}kX", Lost(kind, what)))
        return markers[-1][0]

    # From the last one on: a marker moves all later characters of its field.
    for each in reversed(list(_texts_of(changed, learned))):
        if each.stop - each.start <= _SHORT:
            whole = each.holder[each.field]
            name = marker(each.kind, f"{each.what}: {each.text!r}")
            each.holder[each.field] = f"{whole[: each.stop]}{name}{whole[each.stop :]}"
    for call in _calls_of(changed):
        function, arguments = call.function, call.function["arguments"]
        what = f"{call.what}: {function['name']}({_shortened(_as_text(arguments))})"
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        name = marker("tool_calls", what)
        marked = {**value, name: name}
        function["arguments"] = json.dumps(marked) if isinstance(arguments, str) else marked
        function["name"] += marker("tool_calls", what)
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            function["name"] += marker("tools", f"tool {function['name']}")
    if not markers:
        return []
    try:
        rendered = render(changed, tools)
    except Exception:  # a template may refuse the changed chat; then the first check alone decides
        return []
    return list(dict.fromkeys(part for name, part in markers if name not in rendered))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
