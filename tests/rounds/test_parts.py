"""The parts' settings are those of ordinary commands, and the settings of rounds are checked by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer, TrainingArguments

from coldstill.common.config_file import ConfigInvalid, check_config, described_keys, load_config
from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.rounds.config import RoundsConfig
from coldstill.rounds.estimate import estimate_rounds
from coldstill.rounds.parts import parts_of
from coldstill.rounds.run import RECORD_NAME, RoundsChanged, RoundsDamaged, checked_parts, run_rounds
from coldstill.storage_schema.errors import DatasetNotFound, TokenizerMismatch
from coldstill.storage_schema.header_facts import About, RowWriter, weights_fingerprint
from coldstill.trainer.arguments import RunLength
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.errors import NotStudentRows
from tests import making
from tests.rounds.test_run import settings

DOCUMENT = {
    "output": "o",
    "rounds": 3,
    "source": {"path": "x.jsonl", "template_date": "2026-01-02"},
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "training": {"push_to_hub": "me/student"},
}


def config_of(**changes: Any) -> RoundsConfig:
    return check_config({**DOCUMENT, **changes}, model=RoundsConfig, where="rounds.yaml")


def test_every_part_is_a_configuration_of_its_command_and_round_trips_through_its_file(tmp_path: Path) -> None:
    config = config_of(output=str(tmp_path), start_datasets=["teacher written"], decay=0.5, sampling={"seed": 7})
    parts = parts_of(config)
    assert [part.title for part in parts] == [
        f"round-0{number}/{name}" for number in range(3) for name in ("answers", "scores", "train")
    ]
    for part in parts:
        part.write_config()
        model: Any = TrainConfig if part.command == "train" else CaptureConfig
        read = load_config(str(part.config_path), model=model)
        assert read == model.model_validate(part.settings)
        assert read.output == str(part.folder)
    answers, scores, train = (yaml.safe_load(part.config_path.read_text()) for part in parts[6:])
    assert answers["teacher"]["model"] == train["student"]["model"] == str(tmp_path / "round-01/train/student")
    assert answers["sampling"]["seed"] == 9
    assert scores["source"] == {"rows_of": str(tmp_path / "round-02/answers"), "round": 2}
    assert train["dataset"] == ["teacher written", *(str(tmp_path / f"round-0{n}/scores") for n in range(3))]
    assert train["data"]["weights"] == [0.125, 0.25, 0.5, 1.0]
    pushed = ["push_to_hub" in part.settings.get("training", {}) for part in parts if part.command == "train"]
    assert pushed == [False, False, True]


def test_the_first_round_trains_the_given_student_on_one_dataset() -> None:
    answers, _, train = parts_of(config_of())[:3]
    assert answers.settings["teacher"]["model"] == train.settings["student"]["model"] == "s"
    assert train.settings["dataset"] == "o/round-00/scores"
    assert "weights" not in train.settings["data"]


def test_adapters_are_merged_so_that_the_next_round_writes_with_the_whole_student() -> None:
    config = config_of(student={"model": "s", "lora": {"merge": True, "r": 4}}, writer={"max_images": 3})
    answers, _, train = parts_of(config)[3:6]
    assert answers.settings["teacher"]["model"] == train.settings["student"]["model"] == "o/round-00/train/student"
    assert train.settings["student"]["lora"] == {"merge": True, "r": 4}
    assert answers.settings["teacher"]["max_images"] == 3


@pytest.mark.parametrize(
    "teacher",
    [{}, {"draws": 0}, {"draws": 0, "top_k": 8}, {"draws": 0, "top_k": 16}, {"top_k": 16, "kept_draws": 32}],
)
@pytest.mark.parametrize("draw_method", ["iid", "systematic"])
def test_the_scores_keep_what_the_teachers_settings_mean(teacher: dict[str, Any], draw_method: str) -> None:
    """A default of one key depends on another: a key that is left out may get another value in the part."""
    wanted = TeacherConfig.model_validate({"model": "t", "draw_method": draw_method, **teacher})
    scores = parts_of(config_of(teacher={"model": "t", "draw_method": draw_method, **teacher}))[1]
    assert CaptureConfig.model_validate(scores.settings).teacher == wanted


def test_a_teacher_of_few_images_needs_no_setting_of_the_writer() -> None:
    answers = parts_of(config_of(teacher={"model": "t", "max_images": 4}))[0]
    assert answers.settings["teacher"]["max_images"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"decay": 0}, "greater than 0"),
        ({"decay": 1e-200, "rounds": 2}, "larger decay"),
        ({"rouns": 2}, r"did you mean rounds\?"),
        ({"output": "s3://bucket/x"}, "a local folder as output"),
        ({"source": {"rows_of": "d"}}, "not source.rows_of"),
        ({"source": {"path": "x", "teacher_system": "Be brief."}}, "no source.teacher_system"),
        ({"source": {"path": "x", "teacher_prompt": "p"}}, "no source.teacher_prompt"),
        ({"source": {"path": "x", "teacher_messages": "m"}}, "no source.teacher_messages"),
        ({"source": {"path": "x", "teacher_template_arguments": {"a": 1}}}, "no source.teacher_template_arguments"),
        ({"student": {"from_scratch": {"model_type": "llama"}}}, "cannot answer prompts"),
        ({"student": {"model": "s", "lora": {}}}, "lora.merge true"),
        ({"data": {"weights": [1.0]}}, "decay instead of data.weights"),
        ({"writer": {"max_length": 4096}}, "at least writer.max_length, 4096, not 2048"),
        ({"writer": {"max_images": 9}}, "at least writer.max_images, 9, not 8"),
        ({"training": {"best_metric": "eval_loss"}}, "needs eval_dataset"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        config_of(**changes)


def test_every_key_has_a_sentence() -> None:
    for key, _, sentence in described_keys(RoundsConfig):
        assert sentence.endswith("."), key


def test_a_dry_run_counts_the_prompts_and_names_the_parts(tmp_path: Path) -> None:
    config = RoundsConfig.model_validate(settings(tmp_path))
    found = estimate_rounds(config)
    assert found["prompts"] == found["answers of a round"] == 8
    assert found["targets of a round, at most"] == 48
    assert found["optimizer steps of the first round"] == 3
    assert found["round-01/train"] == f"coldstill train {tmp_path}/rounds/round-01/train.yaml"
    assert not (tmp_path / "rounds").exists()


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"batch_size": 3, "epochs": 3}, 9),  # three batches of each epoch, the third of two rows
        ({"batch_size": 3, "epochs": 3, "gradient_accumulation_steps": 2}, 5),
        ({"batch_size": 8, "epochs": 0.5}, 1),
        ({"batch_size": 2, "pack_length": 64}, "not known: training.pack_length puts"),
    ],
)
def test_a_dry_run_counts_the_steps_that_a_training_takes(
    tmp_path: Path, training: dict[str, Any], steps: int | str
) -> None:
    config = RoundsConfig.model_validate({**settings(tmp_path), "training": training})
    found = estimate_rounds(config)["optimizer steps of the first round"]
    if isinstance(steps, str):
        assert str(found).startswith(steps)
        return
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        num_train_epochs=training["epochs"],
        gradient_accumulation_steps=training.get("gradient_accumulation_steps", 1),
    )
    batches = math.ceil(8 / training["batch_size"])
    assert found == steps == RunLength.of(arguments, batches_per_epoch=batches).steps


def test_a_dry_run_refuses_what_the_run_refuses(tmp_path: Path) -> None:
    document = settings(tmp_path)
    for section, key, value in (("source", "score_ids", "x"), ("teacher", "max_read_length", 100)):
        changed = {**document, section: {**document[section], key: value}}
        with pytest.raises(ConfigInvalid, match=key):
            estimate_rounds(RoundsConfig.model_validate(changed))
    other = making.tiny_llama(tmp_path / "other")
    changed = {**document, "student": {**document["student"], "model": str(other)}}
    with pytest.raises(TokenizerMismatch, match="tokenizer of the student"):
        estimate_rounds(RoundsConfig.model_validate(changed))


@pytest.mark.parametrize("key", ["start_datasets", "eval_dataset"])
def test_given_datasets_are_opened_before_the_student_writes(tmp_path: Path, key: str) -> None:
    def with_dataset(path: Path, **changes: Any) -> RoundsConfig:
        given: object = [str(path)] if key == "start_datasets" else str(path)
        return RoundsConfig.model_validate({**settings(tmp_path), key: given, **changes})

    with pytest.raises(DatasetNotFound, match="missing"):
        run_rounds(with_dataset(tmp_path / "missing"))
    other = making.tiny_tokenizer(tmp_path / "other")
    making.write_dataset(
        tmp_path / "other-dataset", [making.random_rows(2)], header=making.tiny_header(other), tokenizer=other
    )
    with pytest.raises(TokenizerMismatch, match=key):
        run_rounds(with_dataset(tmp_path / "other-dataset"))
    assert not (tmp_path / "rounds").exists()


def test_rows_of_a_teacher_are_refused_for_a_loss_on_student_rows_before_the_student_writes(tmp_path: Path) -> None:
    document = settings(tmp_path)
    teacher = Path(document["teacher"]["model"])
    written = tmp_path / "written"
    making.write_dataset(written, [making.random_rows(2)], header=making.tiny_header(teacher), tokenizer=teacher)
    document["start_datasets"] = [str(written)]
    with pytest.raises(NotStudentRows, match="start_datasets"):
        run_rounds(RoundsConfig.model_validate(document))
    assert not (tmp_path / "rounds").exists()
    for loss in ({"name": "forward_kl"}, {"name": "lightning_opd", "any_rows": True}):
        checked_parts(RoundsConfig.model_validate({**document, "loss": loss}))
    checked_parts(RoundsConfig.model_validate({**document, "start_datasets": [], "eval_dataset": str(written)}))


def test_start_datasets_of_another_model_are_refused_as_every_training_would(tmp_path: Path) -> None:
    document = settings(tmp_path)
    teacher, student = Path(document["teacher"]["model"]), Path(document["student"]["model"])
    own, others = weights_fingerprint(student), weights_fingerprint(teacher)

    def start(name: str, weights: str, number: int) -> RoundsConfig:
        about = About(writer=RowWriter(name="student", weights_fingerprint=weights, round=number))
        header = making.tiny_header(teacher, about=about)
        making.write_dataset(tmp_path / name, [making.random_rows(2)], header=header, tokenizer=teacher)
        return RoundsConfig.model_validate({**document, "start_datasets": [str(tmp_path / name)]})

    checked_parts(start("own", own, 0))
    for name, weights, number in (("other", others, 0), ("later", own, 1)):
        with pytest.raises(NotStudentRows, match=f"start_datasets .*{name}"):
            checked_parts(start(name, weights, number))


def test_models_of_the_hub_are_compared_before_the_student_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = settings(tmp_path)
    other = making.tiny_llama(tmp_path / "other")
    folders = {"me/teacher": document["teacher"]["model"], "me/student": str(other)}
    load = AutoTokenizer.from_pretrained

    def from_hub(name: str, **_: object) -> Any:
        return load(folders[name])

    monkeypatch.setattr("coldstill.pipeline.teachers.checkpoint._require_reachable", lambda _: None)
    monkeypatch.setattr("coldstill.pipeline.teachers.checkpoint._file", lambda *_: None)
    monkeypatch.setattr(
        "coldstill.pipeline.teachers.checkpoint._model_config", lambda c: AutoConfig.from_pretrained(folders[c.model])
    )
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_hub)
    for section, name in (("teacher", "me/teacher"), ("student", "me/student")):
        document[section] = {**document[section], "model": name}
    with pytest.raises(TokenizerMismatch, match="tokenizer of the student me/student"):
        run_rounds(RoundsConfig.model_validate(document))
    assert not (tmp_path / "rounds").exists()


def test_a_teacher_with_too_little_context_is_refused_before_the_student_writes(tmp_path: Path) -> None:
    document = settings(tmp_path)
    document["teacher"]["max_length"] = 513
    with pytest.raises(TeacherUnusable, match="at most 512"):
        run_rounds(RoundsConfig.model_validate(document))
    assert not (tmp_path / "rounds").exists()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("writer", {"max_length": 513}, "writer.max_length\n.*513\n.*\n.*set writer.max_length: 512"),
        ("student", {"model": "."}, "student.model \\.\n.*\n.*\n.*check student.model"),
    ],
)
def test_an_error_of_the_student_as_a_writer_names_the_keys_of_rounds(
    tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    document = settings(tmp_path)
    document["teacher"]["max_length"] = 1024
    document[section] = {**document[section], **change}
    with pytest.raises(TeacherUnusable, match=message) as error:
        run_rounds(RoundsConfig.model_validate(document))
    assert "teacher." not in str(error.value)


@pytest.mark.parametrize("section", ["sampling", "data"])
def test_a_seed_that_only_the_last_round_cannot_have_is_refused_at_the_start(tmp_path: Path, section: str) -> None:
    document = settings(tmp_path, rounds=5)
    document[section] = {**document.get(section, {}), "seed": (1 << 63) - 4}
    with pytest.raises(ConfigInvalid, match=rf"round-04/\w+: {section}\.seed"):
        checked_parts(RoundsConfig.model_validate(document))
    document[section]["seed"] -= 1
    checked_parts(RoundsConfig.model_validate(document))


def test_without_its_record_rounds_are_held_against_the_settings_of_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RoundsConfig.model_validate(settings(tmp_path))
    monkeypatch.setattr("coldstill.rounds.run._run", lambda part, **_: part.folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr("coldstill.rounds.run._summary", lambda _: None)
    run_rounds(config)
    record = tmp_path / "rounds" / RECORD_NAME
    stored = record.read_bytes()
    record.write_text("{")
    with pytest.raises(RoundsDamaged, match="delete this file"):
        run_rounds(config)
    for section, key, value in (("sampling", "max_tokens", 7), ("teacher", "top_k", 9), ("training", "max_steps", 4)):
        record.unlink(missing_ok=True)
        changed = {**config.model_dump(exclude_unset=True), section: {**settings(tmp_path)[section], key: value}}
        with pytest.raises(RoundsChanged, match=rf"\.yaml: {section}\.{key}"):
            run_rounds(RoundsConfig.model_validate(changed))
        assert not record.exists()
    free = {"cluster": {"cpus_per_worker": 0.25}, "training": {**settings(tmp_path)["training"], "logging_steps": 7}}
    run_rounds(RoundsConfig.model_validate(settings(tmp_path, **free, rounds=3)))
    run_rounds(config.model_copy(update={"rounds": 3}))
    assert json.loads(record.read_bytes())["settings"] == json.loads(stored)["settings"]
