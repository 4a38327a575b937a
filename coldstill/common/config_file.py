"""Reads settings from a YAML file and `key=value` arguments. An unknown key is an error that names the nearest one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from .errors import ColdstillError
from .files import did_you_mean
from .models import KeysClash, other_names


class ConfigNotFound(ColdstillError):
    """There is no configuration file at this path.

    Fix: check the path of the settings file, which starts at the folder where the command runs.
    """


class ConfigInvalid(ColdstillError):
    """A configuration file is not YAML, or has an invalid key or value.

    Fix: correct the key or value that the message names; `coldstill capture --help`, `coldstill train --help` and
    `coldstill rounds --help` list all keys.
    """


class _UniqueKeys(yaml.SafeLoader):
    """Reads YAML in which no mapping has a key twice: the last one would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} twice, again in line {line}")
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


Settings = TypeVar("Settings", bound=BaseModel)


def load_config(path: str, *, model: type[Settings], overrides: Sequence[str] = ()) -> Settings:
    """The settings of the YAML file at `path`, with `overrides` such as `teacher.top_k=64` applied.

    Raises `ConfigNotFound`, `ConfigInvalid`.
    """
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        fix = did_you_mean(path) or "check the path"
        raise ConfigNotFound(path, found=error.strerror, wanted="a YAML file", fix=fix) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigInvalid(path, found=str(error), wanted="YAML") from None
    if not isinstance(document, dict):
        found = "an empty file" if document is None else f"a {type(document).__name__}"
        raise ConfigInvalid(
            path,
            found=found,
            wanted="a mapping of keys to values, such as `output: data/first`",
            fix="begin with the example in the guide of the command, or with a file of examples/",
        )
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
    """(dotted key, default or "required", description) of every setting, in order.

    In a section that is one of several models, a description begins with the names of the models with that setting.
    """
    for name, field in model.model_fields.items():
        if variants := _variants(field.annotation):
            yield from _described_variants(field, variants, f"{prefix}{name}.")
            continue
        inner = _inner_model(field.annotation)
        if inner is not None:
            yield from described_keys(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
        yield f"{prefix}{name}", default, field.description or ""


def _described_variants(
    field: FieldInfo, variants: Mapping[str, type[BaseModel]], prefix: str
) -> Iterator[tuple[str, str, str]]:
    chosen = field.get_default(call_default_factory=True)
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for tag, variant in variants.items():
        for key, default, description in described_keys(variant, prefix):
            found.setdefault(key, {}).setdefault((default, description), []).append(tag)
    names = {
        f"{prefix}{name}": _as_yaml(getattr(chosen, name))
        for name, option in type(chosen).model_fields.items()
        if get_origin(option.annotation) is Literal and len(get_args(option.annotation)) == 1
    }
    for key, settings in found.items():
        for (default, description), tags in settings.items():
            others = [tag for tag in variants if tag not in tags]
            owners = f"all but {', '.join(others)}" if 0 < len(others) < len(tags) else ", ".join(tags)
            yield key, names.get(key, default), f"{owners}: {description}" if others else description


def _variants(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models of a tagged union, each by its tag; empty for any other type."""
    tagged = [get_args(member) for member in get_args(annotation) if get_origin(member) is Annotated]
    return {
        note.tag: model
        for model, *notes in tagged
        for note in notes
        if isinstance(note, Tag) and isinstance(model, type) and issubclass(model, BaseModel)
    }


def _has_types(annotation: Any) -> bool:
    """Whether pydantic's location of a problem names the type after the field: of several, none of them a section."""
    types = (
        [one for one in get_args(annotation) if one is not NoneType]
        if get_origin(annotation) in (Union, UnionType)
        else []
    )
    return len(types) > 1 and not _variants(annotation) and _inner_model(annotation) is None


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
    """The model of the subsection `name` of a section, if there is one."""
    field = model.model_fields.get(name) if model else None
    return _inner_model(field.annotation) if field else None


def _spellings(model: type[BaseModel] | None, name: str) -> set[str]:
    """All names, current and old, of the field that is called `name`."""
    for current, field in model.model_fields.items() if model else ():
        names = {current, *other_names(current, field)}
        if name in names:
            return names
    return set()


def _named(error: ValidationError, model: type[BaseModel], path: str) -> ConfigInvalid:
    """The first problem of a validation error, located by the file's own keys."""
    first, location, section, wanted = _first_problem(error, model)
    key = ".".join(location)
    if first["type"] != "extra_forbidden":
        # The input of a check over several keys is a whole section, which would be longer than the message.
        found = None if isinstance(first["input"], dict) else repr(first["input"])[:200]
        problem = first.get("ctx", {}).get("error")
        if isinstance(problem, KeysClash):
            key, found = ".".join([*location, problem.key]), problem.found
        return ConfigInvalid(
            f"{path}: {key}" if key else path,
            found="nothing" if first["type"] == "missing" else found,
            wanted=wanted.removeprefix("Value error, "),
            fix=_number_in_digits(first["input"]),
        )
    names = list(section.model_fields) if section else []
    near = _near(location[-1], [".".join([*location[:-1], name]) for name in names])
    near = near or _near(location[-1], [key for key, _, _ in described_keys(model)])
    return ConfigInvalid(
        f"{path}: {key}",
        found="an unknown key",
        wanted=f"one of {', '.join(names)}",
        fix=f"did you mean {near}?" if near else "remove it, or find its name in the list that --help prints",
    )


def _first_problem(
    error: ValidationError, model: type[BaseModel]
) -> tuple[Mapping[str, Any], list[str], type[BaseModel] | None, str]:
    """The first problem, its keys in the file, the model of their section, and what each type of the field wants.

    A field that may be a string or a list has a problem for each type: the deepest ones fit the value best.
    """
    problems = [(problem, *_located(problem["loc"], model)) for problem in error.errors()]
    start = problems[0][1]
    ours = [problem for problem in problems if problem[1][: len(start)] == start]
    depth = max(len(keys) for _, keys, _ in ours)
    first, keys, section = next(problem for problem in ours if len(problem[1]) == depth)
    others = [problem["msg"] for problem, other, _ in ours if other == keys and problem is not first]
    return (
        first,
        keys,
        section,
        " or ".join([first["msg"], *(text.removeprefix("Input should be ") for text in others)]),
    )


def _near(name: str, keys: Sequence[str]) -> str:
    """The key whose last part is nearly `name`, or is abbreviated by it as `lr` is for learning_rate; empty if none."""
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    initials = {"".join(word[:1] for word in last.split("_")): last for last in reversed(by_last) if "_" in last}
    found = [initials[name]] if name in initials else difflib.get_close_matches(name, by_last, n=1, cutoff=0.6)
    return by_last[found[0]] if found else ""


def _number_in_digits(given: object) -> str:
    """How to write a number that YAML reads as text; empty for anything else."""
    if not isinstance(given, str):
        return ""
    if re.fullmatch(r"[\d.]+ *[kKmM]", given):
        return "write the number in digits, such as 8000 or 8192 for 8k"
    return f"write {float(given):.15g}" if re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d{1,2}", given) else ""


def _located(place: Sequence[int | str], model: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The keys of a file that lead to the pydantic location `place`, and the model of the section that holds it."""
    keys: list[str] = []
    section: type[BaseModel] | None = model
    variants: dict[str, type[BaseModel]] = {}
    a_type_follows = False
    for depth, part in enumerate(place):
        if part in variants:
            section, variants = variants[str(part)], {}
            continue
        if a_type_follows:  # such as `list[str]`, which is no key
            a_type_follows = False
            continue
        keys.append(str(part))
        field = section.model_fields.get(str(part)) if section else None
        a_type_follows = field is not None and _has_types(field.annotation)
        variants = _variants(field.annotation) if field else {}
        if depth < len(place) - 1 and not variants:
            section = _inner_model(field.annotation) if field else None
    return keys, section
