"""Files and folders that a command shall write: each is checked before the work, by its place and its ending."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.running import CAPTURE, run_command


@pytest.mark.parametrize(
    "words",
    [
        ("capture", "absent.yaml", "--summary"),
        ("train", "absent.yaml", "--summary"),
        ("rounds", "absent.yaml", "--summary"),
        ("compare", "absent", "--html"),
        ("compare", "absent", "--png"),
        ("evaluate", "absent", "absent", "--records"),
        ("stats", "absent", "--json"),
        ("stats", "absent", "--png"),
        ("inspect", "absent", "--html"),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    """After a night of training it would be too late."""
    (tmp_path / "file").touch()
    for place, found in (
        (tmp_path, "a folder"),
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert run_command(monkeypatch, *words, place) == 1
        err = capsys.readouterr().err
        assert err.startswith("PageNotWritten")
        assert found in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "ending"),
    [
        (("capture", "absent.yaml", "--summary"), ".json"),
        (("train", "absent.yaml", "--summary"), ".json"),
        (("rounds", "absent.yaml", "--summary"), ".json"),
        (("compare", "absent", "--html"), ".html"),
        (("compare", "absent", "--png"), ".png"),
        (("evaluate", "absent", "absent", "--records"), ".jsonl"),
        (("stats", "absent", "--json"), ".json"),
        (("stats", "absent", "--png"), ".png"),
        (("inspect", "absent", "--html"), ".html"),
    ],
    ids=lambda one: one if isinstance(one, str) else " ".join(one),
)
def test_a_file_has_the_ending_of_its_content_or_none(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    ending: str,
) -> None:
    """A picture called `x.pdf` or `x.json` opens in no program. A file beside the final one may have more endings."""
    assert run_command(monkeypatch, *words, tmp_path / "x.xyz") == 1
    err = capsys.readouterr().err
    assert err.startswith("PageNotWritten")
    assert f"write {tmp_path}/x{ending}" in err
    for name in ("x", f"x{ending}", f"x{ending.upper()}", f".x{ending}.12-ab.part"):
        assert run_command(monkeypatch, *words, tmp_path / name) == 1
        assert "PageNotWritten" not in capsys.readouterr().err


def test_a_file_in_a_new_folder_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_dataset: Path) -> None:
    assert run_command(monkeypatch, "stats", tiny_dataset, "--json", tmp_path / "a" / "b.json") == 0
    assert json.loads((tmp_path / "a" / "b.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ("capture", "CONFIG"),
        ("capture", "CONFIG", "--dry-run"),
        ("rounds", "CONFIG"),
        ("rounds", "CONFIG", "--dry-run"),
        ("train", "CONFIG"),
        ("demo", "--output", "OUTPUT"),
        ("demo", "--vision", "--output", "OUTPUT"),
        ("merge", "DATASET", "--output", "OUTPUT"),
        ("split", "DATASET", "OUTPUT", "--part", "a=0.5", "--part", "b=0.5"),
        ("subset", "DATASET", "OUTPUT"),
        ("push", "DATASET", "OUTPUT"),
        ("pull", "DATASET", "OUTPUT"),
        ("export", "plain", "DATASET", "OUTPUT"),
        ("export", "axolotl", "DATASET", "OUTPUT"),
        ("import", "axolotl", "absent", "OUTPUT", "--tokenizer", "absent", "--teacher", "t"),
        ("import", "distillkit", "absent", "OUTPUT", "--tokenizer", "absent", "--teacher", "t"),
    ],
    ids=lambda words: " ".join(words),
)
@pytest.mark.parametrize(("inside", "found"), [("", "a file"), ("a/b", "a file at")])
def test_an_output_where_no_folder_can_be_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_dataset: Path,
    words: tuple[str, ...],
    inside: str,
    found: str,
) -> None:
    """Sources and models are absent, and a shard is damaged: what is read first would end with another error."""
    (tmp_path / "file").touch()
    next((tiny_dataset / "shards").iterdir()).write_bytes(b"")
    output = os.path.normpath(tmp_path / "file" / inside)
    settings: dict[str, Any] = {**CAPTURE, "output": output, "source": {"path": str(tmp_path / "absent.jsonl")}}
    if words[0] == "rounds":
        settings |= {"rounds": 1, "student": {"model": "absent"}, "sampling": {"max_tokens": 1}}
    if words[0] == "train":
        settings = {"output": output, "dataset": str(tmp_path / "absent"), "student": {"model": "absent"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    places = {"CONFIG": tmp_path / "config.yaml", "DATASET": tiny_dataset, "OUTPUT": output}
    assert run_command(monkeypatch, *(places.get(word, word) for word in words)) == 1
    err = capsys.readouterr().err
    assert err.startswith("UnsupportedStore")
    assert f"found:  {found}" in err
    assert "choose another output" in err
    assert (tmp_path / "file").read_bytes() == b""


def test_a_student_is_not_trained_into_a_folder_named_like_a_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"output": "s3://b/x", "dataset": "d", "student": {"model": "m"}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert run_command(monkeypatch, "train", "train.yaml") == 1
    assert "wanted: a local folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
