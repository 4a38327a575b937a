"""The demo's text: in comes this machine's Python standard library, out go JSONL files for three disjoint parts of it.

Each file of source belongs to one part, chosen by a hash of its name, so that nothing a model has read is ever
measured. Each part has two views: `<part>.raw.jsonl`, rows `{"id", "text"}`, one whole file each, and
`<part>.pairs.jsonl`, rows `{"id", "messages"}`, one function each: its signature and docstring are the user's turn,
its body is the assistant's.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

PARTS = ("teacher", "distill", "held_out")

PART_BORDERS = {"teacher": 0.60, "distill": 0.92, "held_out": 1.0}
"""Upper ends of the parts on the unit interval on which file names are hashed."""

SKIPPED_FOLDERS = frozenset(
    [
        *("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"),
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
    ]
)
"""Tests, data tables and what was installed later: absent on some machines, or no prose and no code worth learning."""

BODY_CHARACTERS = range(24, 1201)
"""Length of a pair's body: shorter ones are `pass` and the like, longer ones do not fit the demo's context."""

PROMPT_CHARACTERS = 900
"""Longest signature with docstring that becomes a pair."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of source: `name` is its path below the standard library, with forward slashes."""

    name: str
    text: str

    @property
    def part(self) -> str:
        """The one part this file belongs to: a function of its name alone."""
        return part_of(self.name)


def part_of(name: str) -> str:
    """The part of a file name: its sha256, read as a number in [0, 1), against `PART_BORDERS`."""
    place = int.from_bytes(_digest(name)[:8]) / 2**64
    return next(part for part, border in PART_BORDERS.items() if place < border)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def source_files(root: Path | None = None) -> list[SourceFile]:
    """All readable files of source below `root` (default: the standard library of the running Python), by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]):
            try:
                found.append(SourceFile(name=name, text=path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return found


def pairs_of(file: SourceFile) -> Iterator[dict]:
    """Rows `{"id", "messages"}` of a file, in the order of its lines. A file that does not parse gives none."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return
    lines = file.text.split("\n")  # as the parser counts: `splitlines` also cuts at form feeds
    for function in sorted(_functions(tree), key=lambda node: node.lineno):
        documented = ast.get_docstring(function) is not None
        body = function.body[1:] if documented else function.body
        head_end = function.body[0].end_lineno if documented else function.lineno
        if not body or body[0].lineno <= (head_end or 0):
            continue  # nothing but a docstring, or a body on the line of its `def`
        prompt = textwrap.dedent("\n".join(lines[function.lineno - 1 : body[0].lineno - 1])).strip()
        answer = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno])).strip("\n").rstrip()
        if len(answer) in BODY_CHARACTERS and len(prompt) <= PROMPT_CHARACTERS:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield {"id": f"{file.name}:{function.lineno}", "messages": messages}


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, but none inside another function: its text belongs to the outer one."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
            else:
                waiting.append(node)


def write_text(
    folder: Path, *, distill_rows: int | None = None, held_out_rows: int | None = None, root: Path | None = None
) -> dict[str, int]:
    """Write the six JSONL files into `folder` and return how many rows each has.

    Pairs stand in the order of a hash of their ids, so that the first `distill_rows` of the distillation part, and the
    first `held_out_rows` of the held-out part, are a fair sample of all files in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"distill": distill_rows, "held_out": held_out_rows}
    raw: dict[str, list[dict]] = {part: [] for part in PARTS}
    pairs: dict[str, list[dict]] = {part: [] for part in PARTS}
    for file in tqdm(source_files(root), desc="reading", unit="file"):
        raw[file.part].append({"id": file.name, "text": file.text})
        pairs[file.part].extend(pairs_of(file))
    counts = {}
    for part in PARTS:
        ordered = sorted(pairs[part], key=lambda row: _digest(row["id"]))[: limits.get(part)]
        for view, rows in (("raw", raw[part]), ("pairs", ordered)):
            with (folder / f"{part}.{view}.jsonl").open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
            counts[f"{part}.{view}"] = len(rows)
    return counts


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
