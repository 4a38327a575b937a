"""OUTPUT of a benchmark that resumes: its settings, and its log of one JSON line for each finished run, runs.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coldstill.common.files import read_json, write_json

SETTINGS_NAME = "settings.json"


def claim(output: Path, **settings: Any) -> None:
    """Record in OUTPUT which benchmark, of which size, keeps its runs there. Raises `SystemExit` if it has others.

    Models, captures and runs that exist are kept, so those of a quick run would count as runs of a full one. A folder
    without a record, of an earlier version, takes the settings of this start.
    """
    path, ours = output / SETTINGS_NAME, json.loads(json.dumps(settings))
    theirs = read_json(path) if path.exists() else ours
    if differing := sorted(key for key in {*ours, *theirs} if theirs.get(key) != ours.get(key)):
        values = ", ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
        raise SystemExit(f"{output} was begun with other settings ({values}): choose another OUTPUT, or restore them")
    write_json(path, ours)


def lines_of(log: Path) -> list[dict[str, Any]]:
    """The records of the finished runs. An unfinished line, of a killed process, is passed over."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(log: Path, *records: dict[str, Any]) -> None:
    """Add a line for each record, on its own line also after an unfinished one."""
    is_torn = log.exists() and log.read_bytes()[-1:] not in (b"", b"\n")
    with log.open("a", encoding="utf-8") as lines:
        if is_torn:
            print(file=lines)
        for record in records:
            print(json.dumps(record), file=lines, flush=True)
