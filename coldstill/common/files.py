"""Writes files and folders that appear under their final name whole, or not at all; finds a misspelled path."""

from __future__ import annotations

import difflib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from .visible import visible

RUN_NAME, SUMMARY_NAME, PAGE_NAME, STUDENT_FOLDER = "run.json", "train_summary.json", "report.html", "student"
"""Files and a folder in the output of a training, which rooms that do not import `trainer` recognize by them."""


def did_you_mean(path: str | Path) -> str:
    """`did you mean PATH?` with an existing path whose parts are nearly those of `path`; empty if there is none."""
    found = Path()
    for part in Path(path).parts:
        if not os.path.exists(found / part):  # which, unlike Path.exists, never raises
            names: list[str] = []
            with suppress(OSError), os.scandir(found) as entries:
                names = [entry.name for entry in islice(entries, 1000)]
            part = next(iter(difflib.get_close_matches(part, names, n=1, cutoff=0.75)), "")
            if not part:
                return ""
        found /= part
    return f"did you mean {visible(str(found))}?" if found != Path(path) else ""


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A path beside `final` to write to. It is renamed to `final` when the block succeeds, and removed otherwise.

    The path is unique, so several processes may write the same `final`: the last rename wins. Nothing is synced to the
    disk; `storage_schema.store.local` syncs where a commit depends on it. A killed writer leaves its `.part` file.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield beside
        os.replace(beside, final)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to fill. It is renamed to `final` when the block succeeds.

    Only one process may write a `final` at a time: files that a killed writer left in the folder are removed first.
    """
    beside = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    os.replace(beside, final)


def write_json(final: Path, document: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Writes a JSON file, whole or not at all."""
    with new_file(final) as beside:
        beside.write_text(json.dumps(document, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
