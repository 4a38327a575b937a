"""Writing beside and renaming: what stands under its final name is whole, whenever the demo was killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.unfinished")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill; it gets its final name when the block ends well, and never otherwise."""
    beside = _beside(final)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    os.replace(beside, final)


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A path to write to; the file gets its final name when the block ends well, and never otherwise."""
    beside = _beside(final)
    beside.parent.mkdir(parents=True, exist_ok=True)
    yield beside
    os.replace(beside, final)


def write_json(final: Path, document: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with new_file(final) as beside:
        beside.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _away(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.put_away")


def bring_back(folder: Path) -> None:
    """Undo `put_away` of a run that was killed inside it."""
    if _away(folder).exists() and not folder.exists():
        os.replace(_away(folder), folder)


@contextmanager
def put_away(folder: Path) -> Iterator[None]:
    """Nothing is found under this name while the block runs."""
    os.replace(folder, _away(folder))
    try:
        yield
    finally:
        bring_back(folder)
