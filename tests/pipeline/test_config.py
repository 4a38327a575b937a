"""Laws of a capture's settings: a renamed key keeps its old name as a second spelling, in files and in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from coldstill.common.config_file import ConfigInvalid, check_config, described_keys, load_config
from coldstill.pipeline.config import CaptureConfig, SamplingConfig, TeacherConfig

REPOSITORY = Path(__file__).parents[2]
PLAIN: dict[str, Any] = {"output": "o", "source": {"path": "x.jsonl"}, "teacher": {"model": "m"}}
RENAMED = [
    ("calibration_targets", "pilot_targets", 5),
    ("license", "licence", "MIT"),
    ("cluster.store_retry_s", "cluster.store_patience_s", 7.0),
]


def _with(key: str, value: object) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    return {**PLAIN, section: {name: value}} if section else {**PLAIN, name: value}


def _value(config: CaptureConfig, key: str) -> object:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _written(folder: Path, document: dict[str, Any]) -> str:
    path = folder / "capture.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.mark.parametrize(("new", "old", "value"), RENAMED)
def test_both_names_give_the_same_settings(new: str, old: str, value: object) -> None:
    by_new, by_old = (CaptureConfig.model_validate(_with(key, value)) for key in (new, old))
    assert by_new == by_old
    assert _value(by_old, new) == value


@pytest.mark.parametrize(("new", "old", "value"), RENAMED)
@pytest.mark.parametrize("in_file", [0, 1])
@pytest.mark.parametrize("in_word", [0, 1])
def test_a_word_replaces_the_file_whichever_name_each_uses(
    tmp_path: Path, new: str, old: str, value: object, in_file: int, in_word: int
) -> None:
    path = _written(tmp_path, _with((new, old)[in_file], 1 if new != "license" else "none"))
    config = load_config(path, model=CaptureConfig, overrides=[f"{(new, old)[in_word]}={value}"])
    assert _value(config, new) == value


@pytest.mark.parametrize(("new", "old", "value"), RENAMED)
def test_a_document_with_both_names_is_refused(new: str, old: str, value: object) -> None:
    document = _with(new, value)
    section, _, name = old.rpartition(".")
    (document[section] if section else document)[name] = value
    with pytest.raises(ConfigInvalid, match=f"unknown key(.|\n)*did you mean {new}"):
        check_config(document, model=CaptureConfig, where="here")


@pytest.mark.parametrize(("new", "old", "value"), RENAMED)
def test_dumps_and_help_use_the_new_name_alone(new: str, old: str, value: object) -> None:
    config = CaptureConfig.model_validate(_with(old, value))
    assert CaptureConfig.model_validate(config.model_dump()) == config
    assert CaptureConfig.model_validate_json(config.model_dump_json()) == config
    assert old.rpartition(".")[2] not in config.model_dump_json()
    keys = [key for key, _, _ in described_keys(CaptureConfig)]
    assert new in keys
    assert old not in keys


@pytest.mark.parametrize("key", ["calibration_target", "licenses", "cluster.store_retry"])
def test_a_misspelled_key_is_refused_with_the_new_name(key: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"did you mean (calibration_targets|license|cluster\.store_retry_s)"):
        check_config(_with(key, 1), model=CaptureConfig, where="here")


def test_a_wrong_value_is_found_under_the_name_that_the_file_uses() -> None:
    for key in ("calibration_targets", "pilot_targets"):
        with pytest.raises(ConfigInvalid, match=f"here: {key}"):
            check_config(_with(key, -1), model=CaptureConfig, where="here")


CANNOT_DRAW: list[dict[str, Any]] = [
    {"engine": "endpoint", "endpoint": "http://host/v1"},
    {"tap": "public"},
    {"engine": "tests.pipeline.teachers.test_custom_teacher:Uniform"},
]


def test_a_capture_keeps_the_top_8_and_64_systematic_draws_by_default() -> None:
    for settings in ({}, {"engine": "transformers"}):
        teacher = TeacherConfig.model_validate({"model": "m", **settings})
        assert (teacher.top_k, teacher.draws, teacher.kept_draws) == (8, 64, 64)
        assert teacher.draw_method == "systematic"
    assert TeacherConfig.model_validate({"model": "m", "draws": 0}).top_k == 16


@pytest.mark.parametrize("settings", CANNOT_DRAW, ids=lambda settings: "-".join(settings))
def test_an_engine_that_cannot_draw_has_no_draws_by_default_and_refuses_them_if_set(settings: dict[str, Any]) -> None:
    teacher = TeacherConfig.model_validate({"model": "m", **settings})
    assert (teacher.top_k, teacher.draws) == (16, 0)
    assert TeacherConfig.model_validate(teacher.model_dump()) == teacher, "as a worker gets it"
    for draws in (1, 64):
        with pytest.raises(ConfigInvalid, match=f"draws 0, not {draws}"):
            check_config({"model": "m", "draws": draws, **settings}, model=TeacherConfig, where="here")


@pytest.mark.parametrize("name", ["qwen2.5_7b_capture.yaml", "qwen2_72b_capture.yaml"])
def test_the_shipped_examples_show_the_defaults(name: str) -> None:
    teacher = load_config(str(REPOSITORY / "examples" / name), model=CaptureConfig).teacher
    assert {"top_k", "draws"} <= teacher.model_fields_set
    assert (teacher.top_k, teacher.draws) == (8, 64)
    assert teacher.engine_args["max_num_batched_tokens"] > 2048, "the tap needs no memory for the logits of a batch"


def _as_file(folder: Path, text: str) -> str:
    (folder / "capture.yaml").write_text(text)
    return str(folder / "capture.yaml")


def test_a_key_that_is_there_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    text = "output: a\nsource:\n  path: x.jsonl\n  path: y.jsonl\nteacher: {model: m}\n"
    with pytest.raises(ConfigInvalid, match="the key path twice, again in line 4"):
        load_config(_as_file(tmp_path, text), model=CaptureConfig)
    merged = "output: a\nbase: &base {path: x.jsonl}\nsource:\n  <<: *base\n  <<: {id: key}\nteacher: {model: m}\n"
    with pytest.raises(ConfigInvalid, match="base"):  # an unknown key, and no key twice
        load_config(_as_file(tmp_path, merged), model=CaptureConfig)


@pytest.mark.parametrize(("given", "advice"), [("8k", "in digits"), ("1e3", "write 1000"), ("many", "")])
def test_a_number_that_yaml_reads_as_text_is_an_error_with_the_way_to_write_it(
    tmp_path: Path, given: str, advice: str
) -> None:
    text = f"output: a\nsource: {{path: x.jsonl}}\nteacher: {{model: m, max_length: {given}}}\n"
    with pytest.raises(ConfigInvalid, match=r"teacher\.max_length") as caught:
        load_config(_as_file(tmp_path, text), model=CaptureConfig)
    assert advice in str(caught.value)
    assert ("do:" in str(caught.value)) == bool(advice)


def test_several_equal_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature 0"):
        SamplingConfig(temperature=0, n=2)
    assert SamplingConfig(temperature=0).n == 1
