"""Laws of the student's tokenizer: equal ids decide, at every entrance; no text is lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coldstill import DistillTrainer, evaluate, load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch, TokenizerNotFound
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, fingerprint
from coldstill.trainer.config import StudentConfig, TrainConfig
from coldstill.trainer.errors import StudentNotFound, UnsupportedArgument
from coldstill.trainer.evaluation.evaluate import evaluate_on_dataset
from coldstill.trainer.student.tokenizer import (
    check_processing_class,
    check_tokenizer,
    load_tokenizer,
    warn_if_unfaithful,
)
from coldstill.trainer.train import train
from tests import making
from tests.trainer.training import arguments

TEXT = "Hello world, so it is. 你好"


def _header(folder: Path, pipeline: str | None) -> DatasetHeader:
    header = making.tiny_header(folder)
    about = header.about.model_copy(update={"tokenizer_pipeline_sha256": pipeline})
    return header.model_copy(update={"about": about})


def test_a_tokenizer_that_splits_text_in_another_way_is_told_and_accepted(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = (tokenizer_folder / TOKENIZER_FILE).read_bytes()
    same = _header(tokenizer_folder, fingerprint(tokenizer_folder).pipeline_sha256)
    with caplog.at_level(logging.WARNING):
        check_tokenizer(data, same, name="s")
        check_tokenizer(data, _header(tokenizer_folder, None), name="s")  # an older dataset does not state it
        assert caplog.text == ""
        check_tokenizer(data, _header(tokenizer_folder, "0" * 64), name="s")
    assert "splits text in another way" in caplog.text
    assert "can be used" in caplog.text


def test_a_tokenizer_that_differs_from_the_datasets_in_flags_that_decoding_does_not_read_is_no_warning(
    tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The header's digest counts these flags, so that a Qwen student of a Qwen teacher was warned."""
    dataset = open_dataset(str(tiny_dataset))
    about = dataset.header.about.model_copy(update={"tokenizer_pipeline_sha256": "0" * 64})
    header = dataset.header.model_copy(update={"about": about})
    document = json.loads(dataset.tokenizer_files()[TOKENIZER_FILE])
    document["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    check_tokenizer(json.dumps(document).encode(), header, name="s", dataset=dataset)
    assert caplog.text == ""
    document["pre_tokenizer"] = {"type": "Whitespace"}
    check_tokenizer(json.dumps(document).encode(), header, name="s", dataset=dataset)
    assert "splits text in another way" in caplog.text


def test_other_ids_are_refused_whatever_the_steps(tokenizer_folder: Path) -> None:
    header = making.tiny_header(tokenizer_folder).model_copy(update={"tokenizer_fingerprint": "0" * 64})
    with pytest.raises(TokenizerMismatch):
        check_tokenizer((tokenizer_folder / TOKENIZER_FILE).read_bytes(), header, name="s")


def test_a_students_tokenizer_is_loaded_as_its_file_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(str(making.misnamed_tokenizer(tmp_path)))
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert "The file decides" in caplog.text
    warn_if_unfaithful(tmp_path)
    assert "load it with PreTrainedTokenizerFast" in caplog.text
    with pytest.raises(StudentNotFound):
        load_tokenizer(str(tmp_path / "nothing"))


def test_a_finished_student_whose_tokenizer_no_class_loads_rightly_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are right; a warning does not cost the run."""
    making.chat_model(tmp_path)
    warn_if_unfaithful(tmp_path)
    assert caplog.text == ""
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps({"model": {}}))
    warn_if_unfaithful(tmp_path)
    assert "tokenizer" in caplog.text


def _swapped(folder: Path) -> Path:
    """Exchange the ids of two tokens of the tokenizer in `folder`: its size stays."""
    document = json.loads((folder / TOKENIZER_FILE).read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / TOKENIZER_FILE).write_text(json.dumps(document))
    return folder


@pytest.fixture
def other_student(tmp_path: Path) -> Path:
    """A student of the right size, two of whose ids mean other tokens."""
    return _swapped(making.tiny_llama(tmp_path / "other student"))


@pytest.fixture
def other_dataset(tmp_path: Path) -> Path:
    """A dataset of the right size, two of whose ids mean other tokens."""
    tokenizer = _swapped(making.tiny_tokenizer(tmp_path / "other tokenizer"))
    rows = making.random_rows(8)
    header = making.tiny_header(tokenizer)
    making.write_dataset(tmp_path / "other dataset", [rows], header=header, tokenizer=tokenizer)
    return tmp_path / "other dataset"


def _config(dataset: Path, student: Path, output: Path, **changes: object) -> TrainConfig:
    fields = {"dataset": str(dataset), "output": str(output), "student": {"model": str(student)}, **changes}
    return TrainConfig.model_validate(fields)


def _refused(enter: Callable[[], object]) -> bool:
    try:
        enter()
    except TokenizerMismatch:
        return True
    return False


def test_a_student_of_other_ids_is_aligned_in_training_and_refused_where_its_tokenizer_is_not_clear_or_compared(
    tiny_dataset: Path, tiny_student: Path, other_student: Path, tmp_path: Path
) -> None:
    dataset, args = load_logit_dataset(tiny_dataset), arguments(tmp_path)
    right = LlamaForCausalLM.from_pretrained(tiny_student)
    other = LlamaForCausalLM.from_pretrained(other_student)
    tokenizer = AutoTokenizer.from_pretrained(other_student)
    for model, processing_class in (
        (str(other_student), None),
        (StudentConfig(model=str(other_student)), tokenizer),
        (other, None),
        (right, tokenizer),
    ):
        trainer = DistillTrainer(model, args, train_dataset=dataset, processing_class=processing_class)
        assert trainer.aligned is not None
    assert DistillTrainer(right, args, train_dataset=dataset).aligned is None
    entrances = [
        lambda: DistillTrainer(str(tiny_student), args, train_dataset=dataset, processing_class=tokenizer),
        lambda: DistillTrainer(
            str(other_student),
            args,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(tiny_student),
        ),
        lambda: evaluate(other_student, tiny_dataset),
        lambda: evaluate(tiny_student, tiny_dataset, teacher=other_student),
        lambda: evaluate_on_dataset(other, tiny_dataset),
        lambda: evaluate_on_dataset(right, tiny_dataset, teacher=other),
    ]
    assert [_refused(enter) for enter in entrances] == [True] * len(entrances)


def test_a_dataset_of_other_ids_is_refused_at_every_entrance(
    tiny_dataset: Path, tiny_student: Path, other_dataset: Path, tmp_path: Path
) -> None:
    right, other, args = load_logit_dataset(tiny_dataset), load_logit_dataset(other_dataset), arguments(tmp_path)
    trainer = DistillTrainer(str(tiny_student), args, train_dataset=right)
    entrances = [
        lambda: DistillTrainer(str(tiny_student), args, train_dataset=right, eval_dataset=other),
        lambda: DistillTrainer(str(tiny_student), args, train_dataset=right, eval_dataset={"a": right, "b": other}),
        lambda: trainer.evaluate(other),
        lambda: trainer.evaluate({"a": right, "b": other}),
        lambda: trainer.get_eval_dataloader(other),
        lambda: trainer.get_test_dataloader(other),
        lambda: train(_config(tiny_dataset, tiny_student, tmp_path / "run", eval_dataset=str(other_dataset))),
        lambda: load_logit_dataset([tiny_dataset, other_dataset]),
        lambda: evaluate(tiny_student, other_dataset),
    ]
    assert [_refused(enter) for enter in entrances] == [True] * len(entrances)


def test_a_student_without_a_tokenizer_is_told_and_a_name_without_one_is_refused(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, args = load_logit_dataset(tiny_dataset), arguments(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    DistillTrainer(LlamaForCausalLM.from_pretrained(tiny_student), args, train_dataset=dataset)
    made = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_student, name_or_path=""))
    made.config.name_or_path = ""
    DistillTrainer(made, args, train_dataset=dataset, processing_class=tokenizer)
    assert "was not checked" not in caplog.text
    DistillTrainer(made, args, train_dataset=dataset)
    assert "LlamaForCausalLM was not checked" in caplog.text
    assert "processing_class" in caplog.text

    bare = making.tiny_llama(tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(TokenizerNotFound):
        DistillTrainer(str(bare), args, train_dataset=dataset)
    DistillTrainer(str(bare), args, train_dataset=dataset, processing_class=tokenizer)
    caplog.clear()
    DistillTrainer(LlamaForCausalLM.from_pretrained(bare), args, train_dataset=dataset)
    assert str(bare) in caplog.text
    with pytest.raises(TokenizerNotFound, match="processor"):
        DistillTrainer(str(bare), args, train_dataset=dataset, processing_class=object())


def test_a_saved_student_loads_with_its_tokenizer_whichever_way_it_was_given(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    dataset = load_logit_dataset(tiny_dataset)
    made = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_student, name_or_path=""))
    made.config.name_or_path = ""
    own = making.tiny_llama(tmp_path / "own")
    (own / "chat_template.jinja").write_text("its own")
    loaded = LlamaForCausalLM.from_pretrained(own)
    given = AutoTokenizer.from_pretrained(own)
    students = {
        "made": (made, {}, None),
        "loaded": (loaded, {}, "its own"),
        "named": (str(own), {}, "its own"),
        "given": (made, {"processing_class": given}, "its own"),
    }
    for name, (student, options, template) in students.items():
        args = arguments(tmp_path / name, max_steps=1, save_strategy="steps", save_steps=1)
        trainer = DistillTrainer(student, args, train_dataset=dataset, report=False, **options)
        trainer.train()
        trainer.save_model()
        for folder in (tmp_path / name, tmp_path / name / "checkpoint-1"):
            saved = AutoTokenizer.from_pretrained(folder)
            assert saved.get_vocab() == given.get_vocab(), name
            assert saved.chat_template == template, name


def test_a_slow_tokenizer_is_checked_by_the_token_of_each_id(tmp_path: Path) -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    for changed in (False, True):
        vocabulary = slow.get_vocab()
        if changed:
            vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        tokenizer, root = tmp_path / f"tokenizer {changed}", tmp_path / f"dataset {changed}"
        backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tokenizer)
        header = making.tiny_header(tokenizer)
        making.write_dataset(root, [making.random_rows(2)], header=header, tokenizer=tokenizer)
        if not changed:
            check_processing_class(slow, open_dataset(root), name="s")
            continue
        with pytest.raises(TokenizerMismatch, match="'A' has the id"):
            check_processing_class(slow, open_dataset(root), name="s")


def test_rows_without_a_teacher_are_refused_by_name(tiny_dataset: Path, tiny_student: Path) -> None:
    dataset = load_logit_dataset(tiny_dataset)
    for name, datasets in (
        ("train_dataset", {"train_dataset": [1]}),
        ("eval_dataset", {"train_dataset": dataset, "eval_dataset": np.zeros(3)}),
        ("eval_dataset", {"train_dataset": dataset, "eval_dataset": {"a": [1]}}),
    ):
        with pytest.raises(UnsupportedArgument, match=name):
            DistillTrainer(str(tiny_student), **datasets)
