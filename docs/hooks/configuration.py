"""Tables of all keys of a capture, a training and rounds, read from the settings classes."""

from __future__ import annotations

import html
import types
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from coldstill.common.config_file import described_keys
from coldstill.pipeline.config import CaptureConfig
from coldstill.rounds.config import RoundsConfig
from coldstill.trainer.config import TrainConfig

COMMANDS: dict[str, type[BaseModel]] = {"capture": CaptureConfig, "train": TrainConfig, "rounds": RoundsConfig}
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "mapping", date: "date"}
SHARED = {
    "rounds": {
        **dict.fromkeys(("source", "teacher", "sampling", "cluster"), "capture"),
        **dict.fromkeys(("student", "loss", "data", "training"), "train"),
    }
}
"""Sections of a command that are those of another one, by the other command."""
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def markdown() -> str:
    """One chapter for each command, with one table for each section of its file."""
    return "\n\n".join(_chapter(command, model) for command, model in COMMANDS.items())


def _chapter(command: str, model: type[BaseModel]) -> str:
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, default, meaning in described_keys(model):
        sections.setdefault(key.rpartition(".")[0], []).append((key, default, meaning))
    parts = [f"## coldstill {command}"]
    if shared := SHARED.get(command):
        links = ", ".join(f"[`{name}`](#{owner}-{name})" for name, owner in shared.items())
        parts.append(f"These sections have the keys of another command: {links}.")
    for section, rows in sections.items():
        if section.partition(".")[0] in SHARED.get(command, {}):
            continue
        title = f"### {command}: {section}" if section else f"### {command}: the file itself"
        parts.append(f"{title}\n\n| key | value | default | meaning |\n|---|---|---|---|")
        for key, default, meaning in rows:
            name, value = key.rpartition(".")[2], cell(value_of(model, key))
            parts[-1] += f"\n| `{name}` | {value} | {cell(default, code=True)} | {cell(meaning)} |"
    return "\n\n".join(parts)


def cell(text: str, *, code: bool = False) -> str:
    """Text that stands in a table: the characters that Markdown or HTML would read are escaped."""
    escaped = html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")
    return f"<code>{escaped}</code>" if code and text != "required" else escaped.replace("`", "&#96;")


def value_of(model: type[BaseModel], key: str) -> str:
    """The values that a dotted key accepts, such as `integer, at least 1`; of several models all of them."""
    return " or ".join(dict.fromkeys(_readable(field) for field in _fields(model, key.split("."))))


def _fields(model: type[BaseModel], path: list[str]) -> Iterator[FieldInfo]:
    first, *rest = path
    field = model.model_fields.get(first)
    if field is None:
        return
    if not rest:
        yield field
        return
    for inner in _models(field.annotation):
        yield from _fields(inner, rest)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _readable(field: FieldInfo) -> str:
    bounds = [
        f"{word} {getattr(note, sign)}"
        for note in field.metadata
        for sign, word in BOUNDS.items()
        if getattr(note, sign, None) is not None
    ]
    return ", ".join([_named(field.annotation), *bounds])


def _named(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _named(arguments[0])
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_named(one) for one in arguments if one is not type(None)))
    if origin in (tuple, list):
        return f"list of {_named(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return NAMES.get(origin or annotation, "any")
