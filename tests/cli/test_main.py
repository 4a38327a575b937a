"""The command line: settings are checked, `--help` lists every key, a user's error ends with a message and code 1."""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml

import coldstill
from coldstill.cli.main import app, main
from coldstill.cli.output import show_result
from coldstill.cli.training_commands import evaluate
from coldstill.common.config_file import described_keys
from coldstill.pipeline.config import CaptureConfig
from coldstill.rounds.config import RoundsConfig
from coldstill.trainer.config import TrainConfig
from tests.cli.running import CAPTURE, run_command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "capture.yaml"
    path.write_text(yaml.safe_dump(CAPTURE))
    return path


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "configs/tiny.yaml"], "config/tiny.yaml"),
        (["verify", "dtaa/first"], "data/first"),
        (["compare", "runs/taid-0"], "runs/taid_0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_of_a_misspelled_path_names_the_path_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], meant: str
) -> None:
    (tmp_path / meant).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, *words) == 1
    assert f"did you mean {meant}?" in capsys.readouterr().err.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("command", "model"), [("capture", CaptureConfig), ("train", TrainConfig), ("rounds", RoundsConfig)]
)
def test_help_lists_every_key_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, model: type
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(monkeypatch, command, "--help") == 0
    out = capsys.readouterr().out
    for key, _, sentence in described_keys(model):
        assert key in out
        assert sentence.endswith("."), f"{key} has no sentence"


@pytest.mark.parametrize(
    ("command", "model"), [("capture", CaptureConfig), ("train", TrainConfig), ("rounds", RoundsConfig)]
)
def test_help_shows_each_key_whole_in_a_narrow_window(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, model: type
) -> None:
    """A key that is cut off cannot be set."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(monkeypatch, command, "--help") == 0
    found = {line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.count("│") == 4}
    assert {key for key, _, _ in described_keys(model)} <= found


def _commands() -> Iterator[tuple[list[str], str]]:
    """The words of each command that needs an argument, and the help of the first one."""

    def walk(command: Any, words: list[str]) -> Iterator[tuple[list[str], str]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, [*words, name])
        needed = [one for one in command.params if one.required and one.param_type_name == "argument"]
        if needed:
            yield words, needed[0].help

    return walk(typer.main.get_command(app), [])


@pytest.mark.parametrize(
    ("words", "meaning"), list(_commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_without_its_argument_says_what_the_argument_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], meaning: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert "Missing argument" in err
    assert meaning
    assert meaning in err


@pytest.mark.parametrize("words", [["inspect"], ["merge"], ["compare"]], ids=lambda words: words[0])
def test_the_usage_writes_brackets_and_dots_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert run_command(monkeypatch, *words, "--help") == 0
    usage = next(line for line in capsys.readouterr().out.splitlines() if "Usage:" in line)
    assert "[[" not in usage
    assert usage.count("...") <= 1


def test_a_file_gets_an_id_in_one_line_and_a_narrow_window_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run_command(monkeypatch, "verify", tiny_dataset) == 0
    assert coldstill.open_dataset(str(tiny_dataset)).dataset_id in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    assert run_command(monkeypatch, "verify", tiny_dataset) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_a_result_shows_lists_as_text_leaves_out_what_it_has_not_and_ends_with_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result: dict[str, Any] = {
        "teachers": ["a", "[red]b\x1b[31m"],
        "taid_t": None,
        "tokens_per_s": 10571.4,
        "perplexity": math.inf,
        "other_tokenizer": {"one_to_one": 1380, "chunk_loss": 5.287492171577785},
    }
    show_result(result, title="train", summary=tmp_path / "s.json", places={"student": "runs/x/student"}, then="Next")
    out = capsys.readouterr().out
    assert "a, [red]b" in out
    assert "\x1b" not in out
    assert "None" not in out
    assert "10,571" in out  # not 1.057e+04
    assert "one to one: 1,380, chunk loss: 5.287" in out
    assert "runs/x/student" in out
    assert out.endswith("Next\n")
    written = json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail)
    assert written == {**result, "perplexity": None}


def test_train_leaves_its_process_group_at_its_end(
    monkeypatch: pytest.MonkeyPatch, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Else NCCL warns, and a thread of gloo may abort the process."""
    torch = pytest.importorskip("torch")

    def train(_: object) -> SimpleNamespace:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        return SimpleNamespace(model_dump=dict)

    monkeypatch.setattr(coldstill.api, "train", train)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({"dataset": str(tiny_dataset), "output": "o", "student": {"model": "m"}}))
    assert run_command(monkeypatch, "train", path) == 0
    assert not torch.distributed.is_initialized()


def test_verify_names_its_findings_one_a_line_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    first, second, _ = sorted((tiny_dataset / "shards").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert run_command(monkeypatch, "verify", "--deep", tiny_dataset) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ShardMissing", "ShardDamaged"]
    assert first.name in lines[0]
    assert second.name in lines[1]


def test_verify_of_a_sound_dataset_prints_its_facts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    assert run_command(monkeypatch, "verify", tiny_dataset) == 0
    assert "dataset id" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "status"])
def test_a_reader_that_ends_is_named_where_work_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """`coldstill train run.yaml | head` must not end a night's run without a word."""
    reader, writer = os.pipe()
    os.close(reader)

    def write(self: object, ctx: object) -> None:
        os.write(writer, b"{'loss': '3.046'}")

    monkeypatch.setattr(typer.core.TyperCommand, "invoke", write)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run_command(monkeypatch, command, "x") == 1
    assert ("re-run the same command to resume" in capsys.readouterr().err) == (command == "train")


def test_a_connection_that_breaks_is_no_reader_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: object, ctx: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "of a worker")

    monkeypatch.setattr(typer.core.TyperCommand, "invoke", write)
    monkeypatch.setattr(sys, "argv", ["coldstill", "train", "x"])
    with pytest.raises(RuntimeError, match="a pipe or connection closed"):
        main()


def test_an_error_is_printed_whole_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(monkeypatch, "verify", tmp_path / "[absent]") == 1
    err = capsys.readouterr().err
    assert err.startswith("DatasetNotFound")
    assert "[absent]" in err
    assert "do:" in err
    assert "Traceback" not in err


def test_the_version_names_the_installed_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "--version") == 0
    first, *libraries = capsys.readouterr().out.splitlines()
    assert first == f"coldstill {coldstill.__version__}"
    assert f"torch {metadata.version('torch')}" in libraries
    assert f"ray {metadata.version('ray')}" in libraries


def test_the_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_COLDSTILL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "coldstill cap")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run_command(monkeypatch) == 0
    assert capsys.readouterr().out.split() == ["capture"]


def test_the_commands_defaults_are_those_of_the_functions_they_call() -> None:
    command = inspect.signature(evaluate).parameters
    function = inspect.signature(coldstill.evaluate).parameters
    shared = (command.keys() & function.keys()) - {"student", "dataset"}
    assert shared == {"teacher", "batch_size", "rows", "dtype"}
    assert {name: command[name].default for name in shared} == {name: function[name].default for name in shared}
