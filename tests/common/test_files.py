"""Laws of files and folders under their final name: whole or not at all, even if their writer is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coldstill.common.files import did_you_mean, new_file, new_folder, read_json, write_json

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from coldstill.common.files import {function}
with {function}(Path(sys.argv[1])) as beside:
    target = beside / "part" if {function}.__name__ == "new_folder" else beside
    target.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_writer(function: str, final: Path) -> None:
    """Run a writer of `final` in a process that is killed in the middle."""
    command = [sys.executable, "-c", KILLED_WRITER.format(function=function), str(final)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL


def test_a_file_appears_when_its_block_succeeds(tmp_path: Path) -> None:
    final = tmp_path / "new" / "folders" / "file"
    with new_file(final) as beside:
        beside.write_text("whole")
        assert not final.exists()
        assert beside.parent == final.parent, "a rename must stay on one disk"
    assert final.read_text() == "whole"
    assert os.listdir(final.parent) == ["file"]


def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    final = tmp_path / "file"
    final.write_text("old")

    def write_half() -> None:
        with new_file(final) as beside:
            beside.write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    assert final.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    final = tmp_path / "file"
    final.write_text("old")
    kill_writer("new_file", final)
    assert final.read_text() == "old"
    with new_file(final) as beside:
        beside.write_text("new")
    assert final.read_text() == "new"


@pytest.mark.parametrize("function", ["new_file", "new_folder"])
def test_a_killed_writer_gives_nothing_under_the_final_name(tmp_path: Path, function: str) -> None:
    kill_writer(function, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_of_concurrent_writers_one_wins_and_a_reader_sees_whole_files_only(tmp_path: Path) -> None:
    final = tmp_path / "file"
    contents = {letter * 200_000 for letter in "abcd"}
    final.write_text("a" * 200_000)

    def write(content: str) -> None:
        for _ in range(30):
            with new_file(final) as beside:
                beside.write_text(content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    seen = {final.read_text()}
    while any(writer.is_alive() for writer in writers):
        seen.add(final.read_text())
    assert seen <= contents
    assert final.read_text() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_when_its_block_succeeds(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    with new_folder(final) as beside:
        (beside / "a").write_text("whole")
        assert not final.exists()
    assert (final / "a").read_text() == "whole"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_failed_block_gives_no_folder(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_folder(tmp_path / "folder") as beside:
            (beside / "half").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert not (tmp_path / "folder").exists()


def test_what_a_killed_writer_left_in_a_folder_is_in_no_later_one(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    kill_writer("new_folder", final)
    assert not final.exists()
    with new_folder(final) as beside:
        (beside / "a").write_text("whole")
    assert os.listdir(final) == ["a"]
    assert os.listdir(tmp_path) == ["folder"]


def test_json_is_written_whole_and_read_back(tmp_path: Path) -> None:
    final = tmp_path / "file.json"
    document = {"b": [1, None], "a": "é"}
    write_json(final, document)
    assert json.loads(final.read_text(encoding="utf-8")) == document
    assert read_json(final) == document
    write_json(final, document, sort_keys=True)
    assert list(json.loads(final.read_text(encoding="utf-8"))) == ["a", "b"]
    with pytest.raises(TypeError):
        write_json(final, {"a": object()})
    assert json.loads(final.read_text(encoding="utf-8")) == document
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_misspelled_path_is_found_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "first\x1b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert did_you_mean("rnus/fiirst\x1b") == "did you mean runs/first␛?"
    assert did_you_mean(tmp_path / "rnus") == f"did you mean {tmp_path}/runs?"
    for path in ("", "runs", "./runs/../runs", "other/first", "runs/second", "x" * 5000, "a\0b", "s3://runs/fiirst"):
        assert did_you_mean(path) == ""
