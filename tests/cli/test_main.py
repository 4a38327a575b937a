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
from coldstill.common.config_file import ConfigInvalid, ConfigNotFound, described_keys, load_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.rounds.config import RoundsConfig
from coldstill.trainer.config import TrainConfig

CAPTURE = {"output": "o", "source": {"path": "x.jsonl"}, "teacher": {"model": "m"}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "capture.yaml"
    path.write_text(yaml.safe_dump(CAPTURE))
    return path


def _run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["coldstill", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_words_replace_keys_of_the_file(config: Path) -> None:
    words = ["teacher.top_k=7", "cluster.max_workers=3", "source.loss_on=all", "teacher.engine_args={a: [1, 2]}"]
    settings = load_config(str(config), model=CaptureConfig, overrides=words)
    assert (settings.teacher.top_k, settings.cluster.max_workers, settings.source.loss_on) == (7, 3, "all")
    assert settings.teacher.engine_args == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("teacher.topk=4", r"did you mean teacher\.top_k\?"),
        ("techer.top_k=4", r"did you mean teacher\?"),
        ("topk=4", r"did you mean teacher\.top_k\?"),
        ("max_length=4", r"did you mean teacher\.max_length\?"),
        ("lr=1", "the list that --help prints"),
        ("teacher.top_k=0", "greater than or equal to 1"),
        ("teacher.top_k=many", "integer"),
        ("source.loss_on=user", "'assistant', 'last_turn' or 'all'"),
        ("teacher.endpoint=http://x/v1", "engine endpoint, and only with it"),
        ("teacher.top_k", "key=value"),
        ("output.x=1", "below a section"),
        ("teacher.model=", "string"),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out(config: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        load_config(str(config), model=CaptureConfig, overrides=[word])


@pytest.mark.parametrize("word", ["lr=1", "training.lr=1", "learning_rate=1", "learning-rate=1"])
def test_a_key_is_found_by_its_usual_abbreviation_and_in_its_own_section(tmp_path: Path, word: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("{dataset: d, output: o, student: {model: m}}")
    with pytest.raises(ConfigInvalid, match=r"did you mean training\.learning_rate\?"):
        load_config(str(path), model=TrainConfig, overrides=[word])


@pytest.mark.parametrize(
    ("word", "key", "wanted"),
    [
        ("student.from_scratch=true", "student.from_scratch", "a valid string or a valid dictionary"),
        ("dataset=5", "dataset", "a valid string or a valid list"),
        ("dataset=[a, 5]", "dataset.1", "a valid string"),
        ("student.lora={target_modules: [5]}", "student.lora.target_modules.0", "a valid string"),
    ],
)
def test_a_value_of_no_allowed_type_is_named_by_its_key_with_every_type(
    tmp_path: Path, word: str, key: str, wanted: str
) -> None:
    (tmp_path / "t.yaml").write_text("dataset: d\noutput: o\nstudent: {model: m}\n")
    with pytest.raises(ConfigInvalid) as caught:
        load_config(str(tmp_path / "t.yaml"), model=TrainConfig, overrides=[word])
    assert str(caught.value).splitlines()[0].endswith(f": {key}")
    assert f"wanted: Input should be {wanted}\n" in f"{caught.value}\n"


def test_a_missing_key_is_named(config: Path) -> None:
    config.write_text(yaml.safe_dump({**CAPTURE, "source": {}}))
    with pytest.raises(ConfigInvalid, match="exactly one of path and dataset"):
        load_config(str(config), model=CaptureConfig)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\t\x00"])
def test_a_file_that_is_no_mapping_is_named(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(ConfigInvalid, match=r"capture\.yaml") as error:
        load_config(str(config), model=CaptureConfig)
    assert "NoneType" not in str(error.value)


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
    assert _run(monkeypatch, *words) == 1
    assert f"did you mean {meant}?" in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_a_file_that_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("[" * 3000)
    with pytest.raises(ConfigInvalid, match="recursion"):
        load_config(str(tmp_path / "a.yaml"), model=CaptureConfig)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigNotFound, match=r"absent\.yaml"):
        load_config(str(tmp_path / "absent.yaml"), model=CaptureConfig)


@pytest.mark.parametrize(
    ("command", "model"), [("capture", CaptureConfig), ("train", TrainConfig), ("rounds", RoundsConfig)]
)
def test_help_lists_every_key_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, model: type
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _run(monkeypatch, command, "--help") == 0
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
    assert _run(monkeypatch, command, "--help") == 0
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
    assert _run(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert "Missing argument" in err
    assert meaning
    assert meaning in err


@pytest.mark.parametrize("words", [["inspect"], ["merge"], ["compare"]], ids=lambda words: words[0])
def test_the_usage_writes_brackets_and_dots_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert _run(monkeypatch, *words, "--help") == 0
    usage = next(line for line in capsys.readouterr().out.splitlines() if "Usage:" in line)
    assert "[[" not in usage
    assert usage.count("...") <= 1


def test_a_file_gets_an_id_in_one_line_and_a_narrow_window_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert _run(monkeypatch, "verify", tiny_dataset) == 0
    assert coldstill.open_dataset(str(tiny_dataset)).dataset_id in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    assert _run(monkeypatch, "verify", tiny_dataset) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_a_result_shows_lists_as_text_leaves_out_what_it_has_not_and_ends_with_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result: dict[str, Any] = {
        "teachers": ["a", "[red]b\x1b[31m"],
        "taid_t": None,
        "tokens_per_s": 10571.4,
        "perplexity": math.inf,
    }
    show_result(result, title="train", summary=tmp_path / "s.json", places={"student": "runs/x/student"}, then="Next")
    out = capsys.readouterr().out
    assert "a, [red]b" in out
    assert "\x1b" not in out
    assert "None" not in out
    assert "10,571" in out  # not 1.057e+04
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
    assert _run(monkeypatch, "train", path) == 0
    assert not torch.distributed.is_initialized()


def test_verify_names_its_findings_one_a_line_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    first, second, _ = sorted((tiny_dataset / "shards").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert _run(monkeypatch, "verify", "--deep", tiny_dataset) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ShardMissing", "ShardDamaged"]
    assert first.name in lines[0]
    assert second.name in lines[1]


def test_verify_of_a_sound_dataset_prints_its_facts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    assert _run(monkeypatch, "verify", tiny_dataset) == 0
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
        assert _run(monkeypatch, command, "x") == 1
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
    assert _run(monkeypatch, "verify", tmp_path / "[absent]") == 1
    err = capsys.readouterr().err
    assert err.startswith("DatasetNotFound")
    assert "[absent]" in err
    assert "do:" in err
    assert "Traceback" not in err


def test_the_version_names_the_installed_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--version") == 0
    first, *libraries = capsys.readouterr().out.splitlines()
    assert first == f"coldstill {coldstill.__version__}"
    assert f"torch {metadata.version('torch')}" in libraries
    assert f"ray {metadata.version('ray')}" in libraries


def test_the_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_COLDSTILL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "coldstill cap")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert _run(monkeypatch) == 0
    assert capsys.readouterr().out.split() == ["capture"]


def test_the_commands_defaults_are_those_of_the_functions_they_call() -> None:
    command = inspect.signature(evaluate).parameters
    function = inspect.signature(coldstill.evaluate).parameters
    shared = (command.keys() & function.keys()) - {"student", "dataset"}
    assert shared == {"teacher", "batch_size", "rows", "dtype"}
    assert {name: command[name].default for name in shared} == {name: function[name].default for name in shared}


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
        assert _run(monkeypatch, *words, place) == 1
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
    assert _run(monkeypatch, *words, tmp_path / "x.xyz") == 1
    err = capsys.readouterr().err
    assert err.startswith("PageNotWritten")
    assert f"write {tmp_path}/x{ending}" in err
    for name in ("x", f"x{ending}", f"x{ending.upper()}", f".x{ending}.12-ab.part"):
        assert _run(monkeypatch, *words, tmp_path / name) == 1
        assert "PageNotWritten" not in capsys.readouterr().err


def test_a_file_in_a_new_folder_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_dataset: Path) -> None:
    assert _run(monkeypatch, "stats", tiny_dataset, "--json", tmp_path / "a" / "b.json") == 0
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
    assert _run(monkeypatch, *(places.get(word, word) for word in words)) == 1
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
    assert _run(monkeypatch, "train", "train.yaml") == 1
    assert "wanted: a local folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
