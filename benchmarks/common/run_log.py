"""The log of a benchmark that resumes: one JSON line for each finished run, in OUTPUT/runs.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
