"""What a row says: a chat with its tools, from a column of messages or from a prompt and its response.

Columns in; a `Conversation`, or None for a row without a chat, out.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from coldstill.pipeline.config import SourceConfig


class RowUnusable(Exception):
    """Nothing can be made of a row: a short reason, which is counted, and a detail."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class Conversation(NamedTuple):
    """Messages and the tools that their assistant may call; `columns` are those that were read for it."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    columns: tuple[str, ...]


def conversation_of(columns: dict[str, Any], source: SourceConfig, *, answered: bool) -> Conversation | None:
    """The chat of a row. `answered`: with the answer to the prompt; otherwise without what the assistant says last.

    Raises `RowUnusable`.
    """
    tools = _tools(columns.get(source.tools))
    if columns.get(source.messages):
        messages = _checked(columns[source.messages])
        used: tuple[str, ...] = (source.messages, source.tools)
    elif columns.get(source.prompt) and (columns.get(source.response) or not (answered and columns.get(source.text))):
        messages = _turn(columns[source.prompt], role="user")
        if answered:
            if not columns.get(source.response):
                raise RowUnusable("no_response", f"{source.response!r} holds no answer to {source.prompt!r}")
            messages += _turn(columns[source.response], role="assistant")
        used = (source.prompt, source.response, source.tools)
    else:
        return None
    if not answered:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise RowUnusable("no_prompt", "nothing stands before the assistant's words")
    return Conversation(messages, tools, used)


def _turn(value: object, *, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _checked(value)


def _checked(messages: object) -> list[dict[str, Any]]:
    """Messages without the fields that are null, as typed columns have them for other messages' sake."""
    if not isinstance(messages, list):
        raise RowUnusable("bad_messages", f"messages are {type(messages).__name__}, not a list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowUnusable("bad_messages", f"message {index} has no role")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            kind = type(content).__name__
            raise RowUnusable("bad_messages", f"content of message {index} is {kind}, neither text nor parts")
    return [
        {name: value for name, value in {"content": None, **message}.items() if value is not None or name == "content"}
        for message in messages
    ]


def _tools(tools: object) -> list[Any] | None:
    """Tools as a list; many datasets hold them as JSON text."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowUnusable("bad_tools", f"tools are no JSON: {error}") from None
    if tools and not isinstance(tools, list):
        raise RowUnusable("bad_tools", f"tools are {type(tools).__name__}, not a list")
    return tools or None  # type: ignore[return-value]
