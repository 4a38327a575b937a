"""The status of rounds is read from their folder alone, and shows that of the part that is not done."""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from coldstill.cli.main import main
from coldstill.cli.status_table import show_status
from coldstill.rounds.run import LOCK_NAME, RECORD_NAME, RoundsDamaged
from coldstill.rounds.status import read_rounds_status


def _rounds(folder: Path, *, rounds: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / RECORD_NAME).write_text(json.dumps({"rounds": rounds, "settings": {}}))
    (folder / LOCK_NAME).touch()
    return folder


def _done(folder: Path, number: int, *names: str) -> None:
    for name in names:
        part = folder / f"round-{number:02}" / name
        part.mkdir(parents=True, exist_ok=True)
        (part / ("train_summary.json" if name == "train" else "manifest.json")).touch()


def test_the_first_part_that_is_not_done_is_the_one_that_is_shown(tmp_path: Path, tiny_dataset: Path) -> None:
    root = _rounds(tmp_path / "rounds")
    found = read_rounds_status(str(root))
    assert (found.state, found.rounds_done, found.round, found.part) == ("stopped", 0, 0, "answers")
    assert found.capture is None
    (root / "round-00").mkdir()
    shutil.copytree(tiny_dataset, root / "round-00" / "answers")
    (root / "round-00" / "answers" / "manifest.json").unlink()
    capture = read_rounds_status(str(root)).capture
    assert capture is not None
    assert capture.state == "idle"
    _done(root, 0, "answers", "scores")
    checkpoint = root / "round-00" / "train" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    assert read_rounds_status(str(root)).steps_done == 0
    (checkpoint / "files.json").touch()
    (checkpoint.with_name("checkpoint-²")).mkdir()  # `isdigit`, and no number
    (checkpoint.with_name("checkpoint-²") / "files.json").touch()
    assert read_rounds_status(str(root)).steps_done == 40
    _done(root, 0, "train")
    found = read_rounds_status(str(root))
    assert (found.rounds_done, found.round, found.part) == (1, 1, "answers")
    assert found.student == str(root / "round-00" / "train" / "student")
    assert not (found.is_over and found.state == "running")
    _done(root, 1, "answers", "scores", "train")
    found = read_rounds_status(str(root))
    assert (found.state, found.round, found.part, found.is_over) == ("finished", None, None, True)


def test_a_part_that_trains_says_when_it_ends(tmp_path: Path) -> None:
    root = _rounds(tmp_path / "rounds")
    _done(root, 0, "answers", "scores")
    run = root / "round-00" / "train"
    run.mkdir(parents=True)
    record = {"state": "running", "step": 30, "max_steps": 90, "written": time.time() - 60, "time_left_s": 3660.0}
    (run / "report.json").write_text(json.dumps(record))
    with (root / LOCK_NAME).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read_rounds_status(str(root))
    assert found.training is not None
    assert (found.training.step, found.training.max_steps) == (30, 90)
    assert found.training.time_left_s == pytest.approx(3600, abs=30)
    training = found.training.model_copy(update={"time_left_s": 3600.0})
    console = Console(width=100, record=True, file=io.StringIO())
    shown = found.model_copy(update={"training": training})
    show_status(shown, console=console, now=datetime(2026, 11, 29, 23, 30))
    text = console.export_text()
    assert "step 30 of 90" in text
    assert "about 00:30 tomorrow" in text
    (run / "report.json").write_text("{")
    assert read_rounds_status(str(root)).training is None


def test_rounds_run_while_a_process_holds_their_lock(tmp_path: Path) -> None:
    root = _rounds(tmp_path / "rounds")
    with (root / LOCK_NAME).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read_rounds_status(str(root))
    assert (found.state, found.is_over) == ("running", False)
    assert read_rounds_status(str(root)).state == "stopped"


def test_the_command_shows_rounds_as_a_table_and_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = _rounds(tmp_path / "rounds")
    _done(root, 0, "answers")
    monkeypatch.setenv("COLUMNS", "200")
    for words in ([], ["--json"], ["--watch"], ["--watch", "--json"]):
        monkeypatch.setattr(sys, "argv", ["coldstill", "status", str(root), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        out = capsys.readouterr().out
        if "--json" in words:
            assert json.loads(out)["part"] == "scores"
        else:
            assert "round-00/scores: the teacher scores the answers" in out


@pytest.mark.parametrize(
    "record",
    [
        "{",
        '{"rounds": 1000000000, "settings": {}}',
        '{"rounds": 0, "settings": {}}',
        '{"rounds": 1e999}',
        "[" * 100_000,
    ],
    ids=["cut", "no_end", "none", "infinite", "deep"],
)
def test_a_damaged_record_is_named(tmp_path: Path, record: str) -> None:
    root = _rounds(tmp_path / "rounds")
    (root / RECORD_NAME).write_text(record)
    with pytest.raises(RoundsDamaged, match=r"rounds\.json"):
        read_rounds_status(str(root))
