"""Chats between people and documents of this machine, split into parts for training, validation and test.

Chats are those of the package `chitchat-dataset`: two people who write to each other, as lines `A: ...` and `B: ...`.
Documents are pieces of Python's standard library. A hash of the chat's id or of the module's name selects the part, so
no held-out part holds a piece of a module of another part. A part takes chats and documents in turns.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coldstill.common.files import new_file
from coldstill.demo.text import module_files

PART_BORDERS = {"train": 0.8, "validation": 0.88, "test": 1.0}
"""Upper end of each part on the unit interval to which ids are hashed."""
HEALING = "healing"
"""Part on which a student without some of its teacher's layers learns to write again."""
CHARACTERS = 640
"""Most characters of a row: about 190 tokens of a large vocabulary. Longer chats are cut, modules are split."""
SHORTEST_CHAT = 160
"""Fewest characters of a chat. Half of the package's chats are shorter: a greeting without an answer."""
_PACKAGE = "chitchat_dataset"


def has_chats() -> bool:
    """Whether the package of chats is installed. Without it all rows are documents."""
    return importlib.util.find_spec(_PACKAGE) is not None


def write_rows(folder: Path, counts: dict[str, int], *, chats: bool = True) -> dict[str, Path]:
    """Write `<part>.jsonl` with rows `{"id", "text"}`, `counts[part]` of them, and return the files.

    Rows of the part `healing` follow those of `train`; no row is in both.
    Raises `ValueError` if a part has too little text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, str]]] = {part: [] for part in PART_BORDERS}
    sources = [_by_part(_documents())] + ([_by_part(_chats())] if chats and has_chats() else [])
    for part, rows in found.items():
        for turn in zip(*(source[part] for source in sources), strict=False):
            rows.extend(turn)
    found[HEALING] = found["train"][counts["train"] :]
    for part, count in counts.items():
        if len(found[part]) < count:
            raise ValueError(f"part {part} has {len(found[part])} rows of text, not {count}")
    paths = {part: folder / f"{part}.jsonl" for part in counts}
    for part, path in paths.items():
        lines = [json.dumps(row) + "\n" for row in found[part][: counts[part]]]
        with new_file(path) as beside:
            beside.write_text("".join(lines), encoding="utf-8")
    return paths


def part_of(name: str) -> str:
    """The part of a chat's id or a module's name: its sha256, read as a number in [0, 1), against `PART_BORDERS`."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return next(part for part, border in PART_BORDERS.items() if place < border)


def _by_part(rows: Iterator[tuple[str, dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {part: [] for part in PART_BORDERS}
    for name, row in rows:
        found[part_of(name)].append(row)
    return found


def _chats() -> Iterator[tuple[str, dict[str, str]]]:
    path = Path(str(importlib.resources.files(_PACKAGE).joinpath("dataset.json")))
    chats: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(chats):
        speakers: dict[str, str] = {}
        lines = []
        for turn in chats[name]["messages"]:
            said = " ".join(message["text"].strip() for message in turn if message["text"].strip())
            if said:
                speaker = speakers.setdefault(turn[0]["sender"], "AB"[len(speakers) % 2])
                lines.append(f"{speaker}: {said}")
        text = "\n".join(lines)
        if len(text) >= SHORTEST_CHAT:
            yield name, {"id": f"chat-{name}", "text": text[:CHARACTERS]}


def _documents() -> Iterator[tuple[str, dict[str, str]]]:
    """Pieces of modules: the first piece of each module, then the second of each, and so on."""
    pieces = []
    for file in module_files():
        for number, start in enumerate(range(0, len(file.text) - CHARACTERS, CHARACTERS)):
            row = {"id": f"{file.name}:{number}", "text": file.text[start : start + CHARACTERS]}
            order = hashlib.sha256(file.name.encode()).digest()
            pieces.append((number, order, file.name, row))
    for _, _, name, row in sorted(pieces, key=lambda piece: piece[:2]):
        yield name, row
