"""The demo's text: its parts share no module, equal calls give equal bytes, and pairs are whole functions."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from coldstill.demo.text import (
    BODY_CHARACTERS,
    PARTS,
    ModuleFile,
    module_files,
    pairs_of,
    part_of,
    read_rows,
    write_text,
)

SOURCE = '''
import os


def documented(path, *, deep=False):
    """What is under `path`.

    Two paragraphs.
    """
    found = os.listdir(path)
    return sorted(found) if deep else found


class Box:
    @property
    def volume(self):
        # A comment before the first statement belongs to the user's turn.
        def inner():
            return self.width * self.height
        return inner() * self.depth_of_the_box

    def short(self):
        pass

    def beside(self): return self.volume + self.volume

    async def waited_for(
        self,
        other,
    ):
        await other.finished_at_last()
'''


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 small files, one of them in a skipped folder, one that does not parse, one that is not UTF-8."""
    root = tmp_path_factory.mktemp("library")
    for index in range(60):
        path = root / f"package_{index % 7}" / f"module_{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SOURCE.replace("documented", f"documented_{index}"))
    (root / "package_0" / "broken.py").write_text("def unfinished(:\n")
    (root / "package_0" / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "test").mkdir()
    (root / "test" / "test_skipped.py").write_text(SOURCE)
    return root


@pytest.fixture(scope="module")
def text(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, root=library)
    return folder


def test_no_file_is_in_two_parts_and_none_is_lost(library: Path, text: Path) -> None:
    names = [row["id"] for part in PARTS for row in read_rows(text / f"{part}.raw.jsonl")]
    assert sorted(names) == sorted(file.name for file in module_files(library))
    assert len(names) == len(set(names)) == 61


def test_pairs_stand_in_the_part_of_their_file(text: Path) -> None:
    for part in PARTS:
        files = {row["id"] for row in read_rows(text / f"{part}.raw.jsonl")}
        pairs = {row["id"].rpartition(":")[0] for row in read_rows(text / f"{part}.pairs.jsonl")}
        assert pairs
        assert pairs <= files


def test_a_part_depends_on_the_name_alone() -> None:
    assert ModuleFile(name="asyncio/queues.py", text="").part == ModuleFile(name="asyncio/queues.py", text="x = 1").part
    counted = [part_of(f"module_{index}.py") for index in range(2000)]
    shares = {part: counted.count(part) / len(counted) for part in PARTS}
    assert shares == pytest.approx({"teacher": 0.60, "distill": 0.32, "held_out": 0.08}, abs=0.04)


def test_the_same_library_gives_the_same_bytes(library: Path, text: Path, tmp_path: Path) -> None:
    write_text(tmp_path, root=library)
    for path in sorted(text.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_limits_take_the_first_rows_of_the_same_order(library: Path, text: Path, tmp_path: Path) -> None:
    counts = write_text(tmp_path, distill_rows=5, held_out_rows=2, root=library)
    assert (counts["distill.pairs"], counts["held_out.pairs"]) == (5, 2)
    for part, rows in (("distill", 5), ("held_out", 2)):
        name = f"{part}.pairs.jsonl"
        assert read_rows(tmp_path / name) == read_rows(text / name)[:rows]


def test_tests_and_unreadable_files_are_left_out(library: Path) -> None:
    names = [file.name for file in module_files(library)]
    assert "package_0/broken.py" in names
    assert not {"test/test_skipped.py", "package_0/latin.py"} & set(names)


def test_a_pair_is_signature_and_docstring_then_the_body() -> None:
    rows = {row["id"]: [turn["content"] for turn in row["messages"]] for row in _pairs(SOURCE)}
    assert list(rows) == ["a.py:5", "a.py:16", "a.py:27"]
    prompt, answer = rows["a.py:5"]
    assert prompt.startswith("def documented(path, *, deep=False):\n")
    assert prompt.endswith('Two paragraphs.\n    """')
    assert answer == "found = os.listdir(path)\nreturn sorted(found) if deep else found"
    assert rows["a.py:27"] == ["async def waited_for(\n    self,\n    other,\n):", "await other.finished_at_last()"]


def test_nested_functions_make_no_pairs_of_their_own() -> None:
    [answer] = [row["messages"][1]["content"] for row in _pairs(SOURCE) if row["id"] == "a.py:16"]
    assert answer.startswith("def inner():\n    return")
    assert answer.endswith("return inner() * self.depth_of_the_box")


def test_a_form_feed_does_not_shift_the_lines() -> None:
    assert [row["messages"] for row in _pairs("x = 1\n\x0c\n" + SOURCE)] == [row["messages"] for row in _pairs(SOURCE)]


def test_a_file_that_does_not_parse_gives_no_pairs() -> None:
    assert _pairs("def unfinished(:\n") == []


def test_on_the_real_library_prompt_and_answer_make_a_function_again() -> None:
    files = [file for file in module_files() if file.name.startswith(("json/", "dataclasses", "heapq", "textwrap"))]
    rows = [row for file in files for row in pairs_of(file)]
    assert len(rows) > 50
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        prompt, answer = (turn["content"] for turn in row["messages"])
        assert len(answer) in BODY_CHARACTERS
        ast.parse(prompt + "\n" + textwrap.indent(answer, " " * 4))


def _pairs(source: str) -> list[dict]:
    return list(pairs_of(ModuleFile(name="a.py", text=source)))
