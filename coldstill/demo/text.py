"""Splits this machine's Python standard library into three disjoint parts, as JSONL files.

A hash of a module's name selects its part, so no model is measured on text that it was trained on. Each part has two
views. `<part>.raw.jsonl` has rows `{"id", "text"}`, one module each. `<part>.pairs.jsonl` has rows
`{"id", "messages"}`, one function each: the user's turn is its signature and docstring, the assistant's is its body.
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

from coldstill.common.progress import tqdm

PARTS = ("teacher", "distill", "held_out")

PART_BORDERS = {"teacher": 0.60, "distill": 0.92, "held_out": 1.0}
"""Upper end of each part on the unit interval to which module names are hashed."""

SKIPPED_FOLDERS = frozenset(
    [
        *("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"),
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
    ]
)
"""Tests, data tables and installed packages: absent on some machines, or poor training text."""

BODY_CHARACTERS = range(24, 1201)
"""Accepted lengths of a pair's body. Shorter bodies are `pass` and the like; longer ones exceed the context."""

PROMPT_CHARACTERS = 900
"""Length of the longest signature and docstring that become a pair."""


@dataclass(frozen=True, kw_only=True)
class ModuleFile:
    """One Python module: `name` is its path below the standard library, with forward slashes."""

    name: str
    text: str

    @property
    def part(self) -> str:
        """The part of this module, which depends on its name only."""
        return part_of(self.name)


def part_of(name: str) -> str:
    """The part of a module name: compares its sha256, read as a number in [0, 1), with `PART_BORDERS`."""
    place = int.from_bytes(_digest(name)[:8]) / 2**64
    return next(part for part, border in PART_BORDERS.items() if place < border)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def module_files(root: Path | None = None) -> list[ModuleFile]:
    """All readable modules below `root` (default: the running Python's standard library), sorted by name."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]):
            try:
                found.append(ModuleFile(name=name, text=path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return found


def pairs_of(file: ModuleFile) -> Iterator[dict]:
    """Yield a module's rows `{"id", "messages"}` in line order. A module that does not parse has none."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return
    lines = file.text.split("\n")  # as the parser does: `splitlines` also splits at form feeds
    for function in sorted(_functions(tree), key=lambda node: node.lineno):
        documented = ast.get_docstring(function) is not None
        body = function.body[1:] if documented else function.body
        head_end = function.body[0].end_lineno if documented else function.lineno
        if not body or body[0].lineno <= (head_end or 0):
            continue  # only a docstring, or the body is on the line of its `def`
        prompt = textwrap.dedent("\n".join(lines[function.lineno - 1 : body[0].lineno - 1])).strip()
        answer = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno])).strip("\n").rstrip()
        if len(answer) in BODY_CHARACTERS and len(prompt) <= PROMPT_CHARACTERS:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield {"id": f"{file.name}:{function.lineno}", "messages": messages}


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, without those nested in a function: their text belongs to the outer one."""
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
    """Write the six JSONL files into `folder` and return the number of rows of each.

    A hash of the ids orders the pairs, so that the first `distill_rows` and `held_out_rows` sample all modules fairly.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"distill": distill_rows, "held_out": held_out_rows}
    raw: dict[str, list[dict]] = {part: [] for part in PARTS}
    pairs: dict[str, list[dict]] = {part: [] for part in PARTS}
    for file in tqdm(module_files(root), desc="reading", unit="file"):
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
    """Read the rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
