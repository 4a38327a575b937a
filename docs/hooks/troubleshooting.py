"""The page of all named errors: each with its cause and its cure, read from the error classes."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

from coldstill.common.errors import ColdstillError

PACKAGE = Path(__file__).parents[2] / "coldstill"
ROOMS = {
    "common": "Settings, packages and images",
    "storage_schema": "Datasets and stores",
    "pipeline": "Capture",
    "trainer": "Training and evaluation",
    "rounds": "Rounds",
    "tools": "Dataset tools",
    "demo": "Demo",
}
CLASS = re.compile(r"^class (\w+)\(([\w., ]+)\):", re.MULTILINE)


def markdown() -> str:
    """One chapter for each part of the package, with one heading for each error class."""
    chapters: dict[str, list[str]] = {title: [] for title in ROOMS.values()}
    for error in error_classes():
        cause, cure = cause_and_cure(error)
        room = ROOMS[error.__module__.split(".")[1]]
        chapters[room].append(f"### {error.__name__}\n\n{escaped(cause)}\n\n**What to do:** {escaped(cure)}")
    return "\n\n".join("\n\n".join([f"## {title}", *errors]) for title, errors in chapters.items() if errors)


def error_classes() -> list[type[ColdstillError]]:
    """All error classes of the package that a user can meet, in the order of their modules and names."""
    for module in sorted(_modules_with_errors()):
        importlib.import_module(module)
    found = {error for error in _below(ColdstillError) if error.__module__.startswith("coldstill.")}
    return sorted(found, key=lambda error: (error.__module__, error.__name__))


def cause_and_cure(error: type[ColdstillError]) -> tuple[str, str]:
    """What the error says, and what to do. The cure is the part of the docstring behind `Fix:`, or `usual_fix`."""
    text = " ".join((inspect.cleandoc(error.__doc__ or "")).split())
    cause, _, cure = text.partition(" Fix: ")
    cure = cure or error.usual_fix
    return cause, cure[:1].upper() + cure[1:].rstrip(".") + "." * bool(cure)


def escaped(text: str) -> str:
    """Docstrings are plain text with code between backticks: outside of it nothing is Markdown or HTML."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_") for part in parts[::2]]
    return "`".join(parts)


def _modules_with_errors() -> set[str]:
    """The modules that define an error class, found by their text: importing all modules would need every extra."""
    bases = {
        (module, name): {base.strip().rpartition(".")[2] for base in parents.split(",")}
        for module, path in _python_files()
        for name, parents in CLASS.findall(path.read_text(encoding="utf-8"))
    }
    names, known = {ColdstillError.__name__}, 0
    while len(names) > known:
        known = len(names)
        names |= {name for (_, name), parents in bases.items() if parents & names}
    return {module for (module, name) in bases if name in names}


def _python_files() -> Iterator[tuple[str, Path]]:
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder) / file
                yield ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts), path


def _below(error: type[ColdstillError]) -> Iterator[type[ColdstillError]]:
    for child in error.__subclasses__():
        yield child
        yield from _below(child)
