"""A file or folder appears under its final name whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coldstill.common.files import new_file, new_folder, read_json, write_json


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path, make) -> None:
    final = tmp_path / "final"
    program = (
        "import os, pathlib, signal, sys; from coldstill.common.files import new_file, new_folder\n"
        f"with {make.__name__}(pathlib.Path(sys.argv[1])) as beside:\n"
        "    (beside / 'half' if beside.is_dir() else beside).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(final)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()
    with make(final) as beside:
        (beside / "whole" if beside.is_dir() else beside).write_text("whole")
    # Writers of files have names of their own, so a killed one leaves its hidden part behind.
    rest = [path for path in tmp_path.rglob("*") if not (path.name.startswith(".final.") and path.suffix == ".part")]
    assert sorted(path.name for path in rest) == (["final", "whole"] if make is new_folder else ["final"])


def test_a_writer_that_raises_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    def fail(make) -> None:
        with make(tmp_path / "final") as beside:
            (beside / "half" if beside.is_dir() else beside).write_text("half")
            raise OSError("full")

    for make in (new_folder, new_file):
        with pytest.raises(OSError, match="full"):
            fail(make)
        assert not (tmp_path / "final").exists()


def test_a_failed_file_leaves_no_part_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"key": object()})
    assert os.listdir(tmp_path) == []


def test_json_round_trips(tmp_path: Path) -> None:
    write_json(tmp_path / "folder" / "a.json", {"b": [1, None], "a": "\u00e9"})
    assert read_json(tmp_path / "folder" / "a.json") == {"b": [1, None], "a": "\u00e9"}
