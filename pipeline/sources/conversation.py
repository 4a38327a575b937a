"""Reads the chat of a source row: its messages and tools, from whatever columns hold them.

A chat is in a column of messages, or in a prompt and its response.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from coldstill.pipeline.config import SourceConfig
from coldstill.pipeline.reject_reasons import RejectReason


class RowUnusable(Exception):
    """A row cannot become a sequence. The reason is counted; the detail explains it."""

    def __init__(self, reason: RejectReason, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class Conversation(NamedTuple):
    """Messages, and the tools that the assistant may call; `columns` are those that they were read from."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    columns: tuple[str, ...]


def conversation_of(columns: dict[str, Any], source: SourceConfig, *, answered: bool) -> Conversation | None:
    """The chat of a row, None for a row without one.

    `answered`: with the answer to the prompt; otherwise without the assistant messages at the end.
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
                detail = f"column {source.response!r} is empty, {source.prompt!r} is not"
                raise RowUnusable(RejectReason.NO_RESPONSE, detail)
            messages += _turn(columns[source.response], role="assistant")
        used = (source.prompt, source.response, source.tools)
    else:
        return None
    if not answered:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise RowUnusable(RejectReason.NO_PROMPT, "all messages are the assistant's")
    return Conversation(messages, tools, used)


def _turn(value: object, *, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _checked(value)


def _checked(messages: object) -> list[dict[str, Any]]:
    """Messages without null fields, which typed columns add because other messages have those fields."""
    bad = RejectReason.BAD_MESSAGES
    if not isinstance(messages, list):
        raise RowUnusable(bad, f"messages are {type(messages).__name__}, not a list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowUnusable(bad, f"message {index} has no role")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise RowUnusable(bad, f"content of message {index} is {type(content).__name__}, neither text nor parts")
    return [
        {name: value for name, value in {"content": None, **message}.items() if value is not None or name == "content"}
        for message in messages
    ]


def _tools(tools: object) -> list[Any] | None:
    """Tools as a list; many datasets store them as JSON text."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowUnusable(RejectReason.BAD_TOOLS, f"tools are not JSON: {error}") from None
    if tools and not isinstance(tools, list):
        raise RowUnusable(RejectReason.BAD_TOOLS, f"tools are {type(tools).__name__}, not a list")
    return tools or None  # type: ignore[return-value]
