"""Settings of a file and of the command line: each wrong one is named with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from coldstill.common.config_file import ConfigInvalid, ConfigNotFound, load_config
from coldstill.pipeline.config import CaptureConfig
from coldstill.trainer.config import TrainConfig
from tests.cli.running import CAPTURE


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "capture.yaml"
    path.write_text(yaml.safe_dump(CAPTURE))
    return path


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


def test_a_file_that_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("[" * 3000)
    with pytest.raises(ConfigInvalid, match="recursion"):
        load_config(str(tmp_path / "a.yaml"), model=CaptureConfig)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigNotFound, match=r"absent\.yaml"):
        load_config(str(tmp_path / "absent.yaml"), model=CaptureConfig)
