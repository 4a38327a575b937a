"""Reads settings from a YAML file and `key=value` arguments. An unknown key is an error that names the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ColdstillError
from .models import other_names


class ConfigNotFound(ColdstillError):
    """There is no configuration file at this path."""


class ConfigInvalid(ColdstillError):
    """A configuration file is not YAML, or has an invalid key or value."""


Settings = TypeVar("Settings", bound=BaseModel)


def load_config(path: str, *, model: type[Settings], overrides: Sequence[str] = ()) -> Settings:
    """The settings of the YAML file at `path`, with `overrides` such as `teacher.top_k=64` applied.

    Raises `ConfigNotFound`, `ConfigInvalid`.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigNotFound(path, found=error.strerror, wanted="a YAML file", fix="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigInvalid(path, found=str(error), wanted="YAML") from None
    if not isinstance(document, dict):
        raise ConfigInvalid(path, found=type(document).__name__, wanted="a mapping of keys to values")
    for word in overrides:
        _override(document, word, model)
    return check_config(document, model=model, where=path)


def check_config(document: Mapping[str, Any], *, model: type[Settings], where: str) -> Settings:
    """The settings in a mapping. Raises `ConfigInvalid`; `where` is the file or variable that the error names."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise _named(error, model, where) from None


def described_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default or "required", description) of every setting, in order."""
    for name, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is not None:
            yield from described_keys(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
        yield f"{prefix}{name}", default, field.description or ""


def _as_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _override(document: dict[str, Any], word: str, model: type[BaseModel]) -> None:
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise ConfigInvalid(f"argument {word!r}", found="no `=`", wanted="key=value, for instance teacher.top_k=64")
    *folders, name = key.split(".")
    section: type[BaseModel] | None = model
    for folder in folders:
        document, section = document.setdefault(folder, {}), _section(section, folder)
        if not isinstance(document, dict):
            raise ConfigInvalid(f"argument {word!r}", found=f"{folder} is a value", wanted="a key below a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"argument {word!r}", found=str(error), wanted="a YAML value") from None
    for spelling in _spellings(section, name):  # the file may use an older name of the key
        document.pop(spelling, None)
    document[name] = value


def _section(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The model of a section's section, if there is one of that name."""
    field = model.model_fields.get(name) if model else None
    return _inner_model(field.annotation) if field else None


def _spellings(model: type[BaseModel] | None, name: str) -> set[str]:
    """All names of the field that `name` is a name of."""
    for current, field in model.model_fields.items() if model else ():
        names = {current, *other_names(current, field)}
        if name in names:
            return names
    return set()


def _named(error: ValidationError, model: type[BaseModel], path: str) -> ConfigInvalid:
    """The first problem of a validation error, located by the file's own keys."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] != "extra_forbidden":
        # The input of a check over several keys is a whole section, which would be longer than the message.
        found = None if isinstance(first["input"], dict) else repr(first["input"])[:200]
        return ConfigInvalid(
            f"{path}: {key}",
            found="nothing" if first["type"] == "missing" else found,
            wanted=first["msg"].removeprefix("Value error, "),
        )
    section: type[BaseModel] | None = model
    for part in location[:-1]:
        section = _section(section, part)
    names = list(section.model_fields) if section else []
    near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.0)
    return ConfigInvalid(
        f"{path}: {key}",
        found="an unknown key",
        wanted=f"one of {', '.join(names)}",
        fix=f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else "remove it",
    )
