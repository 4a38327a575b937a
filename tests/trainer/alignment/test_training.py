"""A student with another tokenizer, through the whole of training: its entrances, evaluation, two processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from coldstill import DistillTrainer, TrainConfig, load_logit_dataset, train
from coldstill.trainer.alignment import collator
from coldstill.trainer.alignment import student as aligned_student
from coldstill.trainer.alignment.aligned_rows import RowAligner
from coldstill.trainer.alignment.objective import AlignedObjective
from coldstill.trainer.errors import OtherTokenizerUnsupported, TokenizerNotAligned, UnknownMetric
from coldstill.trainer.student import tokenizer as student_tokenizer
from tests.trainer.ddp_run import train as run_once
from tests.trainer.test_ddp import run_ranks
from tests.trainer.training import KillAt, Killed, arguments, build, weights_of

from . import tokenizers_made as made

STEPS = {"per_device_train_batch_size": 4, "num_train_epochs": 2}


def run(dataset: Path, student: Path, output: Path, **changes) -> tuple[DistillTrainer, list[torch.Tensor]]:
    trainer, gradients = build(dataset, LlamaForCausalLM.from_pretrained(student), output, **{**STEPS, **changes})
    trainer.train()
    return trainer, gradients.steps


def config(dataset: Path, model: Path, output: Path, **changes) -> TrainConfig:
    fields = {
        "dataset": str(dataset),
        "output": str(output),
        "student": {"model": str(model)},
        "training": {"batch_size": 4, "epochs": 1, "learning_rate": 1e-3, "logging_steps": 1},
    }
    return TrainConfig.model_validate({**fields, **changes})


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the alignment logs."""
    lines: list[str] = []
    monkeypatch.setattr(aligned_student.logger, "warning", lines.append)
    return lines


@pytest.mark.parametrize(
    ("kind", "loss"), [("text", "taid"), ("chat", "forward_kl"), ("chat", {"name": "js", "cross_entropy_share": 0.25})]
)
def test_the_same_tokenizer_through_this_path_is_ordinary_training(
    kind: str, loss, datasets, students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary, wanted = run(datasets[kind], students["bytes"], tmp_path / "ordinary", loss=loss)
    monkeypatch.setattr(student_tokenizer, "has_other_ids", lambda *_, **__: True)

    def of_all(aligner: RowAligner) -> dict[int, int]:
        return {id_: id_ for id_ in np.flatnonzero(aligner.teacher.special).tolist()}

    # The random teacher gives mass to all special tokens, also to those without a role within a text.
    monkeypatch.setattr(collator, "_roles_in_map", of_all)
    aligned, found = run(datasets[kind], students["bytes"], tmp_path / "aligned", loss=loss)
    assert isinstance(aligned.objective, AlignedObjective)
    assert not isinstance(ordinary.objective, AlignedObjective)
    assert aligned.objective.counts.logs()["share_one_to_one"] == 1
    assert aligned.record.targets == ordinary.record.targets
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(aligned.state.log_history, ordinary.state.log_history, strict=True):
        for name in {"loss", "bucket_kl", "taid_t"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6)


def test_named_ids_are_kept_ids_like_the_others(datasets, tokenizers, students, tmp_path: Path) -> None:
    """A position's kept set is read as a set: the same sets under a header that says who chose them train the same."""
    rows = made.text_rows(tokenizers["bytes"])
    facts = {"kept_ids": "top_k_and_named", "about": {"score_ids": {"column": "ids", "top_k": 12, "most": 4}}}
    named = made.write(tmp_path / "named", rows, tokenizers["bytes"], **facts)
    _, wanted = run(datasets["text"], students["unigram"], tmp_path / "plain", num_train_epochs=1)
    trainer, found = run(named, students["unigram"], tmp_path / "trained", num_train_epochs=1)
    assert isinstance(trainer.objective, AlignedObjective)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_loader_workers_and_a_killed_run_change_nothing(kind: str, datasets, students, tmp_path: Path) -> None:
    shape = {"save_strategy": "steps", "save_steps": 1}
    dataset, student = datasets[kind], students["unigram"]
    wanted = weights_of(run(dataset, student, tmp_path / "alone", **shape)[0].model)
    workers = run(dataset, student, tmp_path / "workers", dataloader_num_workers=2)[0]
    model = LlamaForCausalLM.from_pretrained(student)
    killed, _ = build(dataset, model, tmp_path / "killed", callbacks=[KillAt(3)], **STEPS, **shape)
    with pytest.raises(Killed):
        killed.train()
    resumed, _ = build(dataset, LlamaForCausalLM.from_pretrained(student), tmp_path / "killed", **STEPS, **shape)
    resumed.train(resume_from_checkpoint=True)
    for trainer in (workers, resumed):
        for name, weight in weights_of(trainer.model).items():
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=0)
    assert resumed.objective.counts.state_dict() == workers.objective.counts.state_dict()


@pytest.mark.slow
def test_two_processes_train_like_one(datasets, students, tmp_path: Path) -> None:
    first, second = (found["unbroken"] for found in run_ranks(datasets["chat"], students["more bytes"], tmp_path))
    alone = run_once(datasets["chat"], students["more bytes"], tmp_path / "alone", gradient_accumulation_steps=2)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(first["weights"][name], second["weights"][name], rtol=0, atol=0)
    for mine, wanted in zip(first["log"], alone["log"], strict=True):
        for name in ("loss", "share_one_to_one", "share_in_larger_chunks", "one_to_one_loss", "chunk_loss", "taid_t"):
            assert mine[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-7)
    assert first["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-4)


def test_a_run_says_what_is_aligned_and_its_student_stops_at_its_own_end(
    datasets, students, tmp_path: Path, told: list[str]
) -> None:
    found = config(datasets["chat"], students["more bytes"], tmp_path / "run", eval_dataset=str(datasets["chat"]))
    summary = train(found)
    assert "has another tokenizer than the dataset: of " in told[0]
    assert "larger chunks get ALM with weight 1" in told[0]
    counts = summary.other_tokenizer
    assert counts["rows"] == 16
    assert counts["skipped_rows"] == counts["lost"] == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    last = [line for line in log if "loss" in line][-1]
    assert last["share_one_to_one"] == counts["one_to_one"] / (counts["one_to_one"] + counts["in_larger_chunks"])
    assert {"eval_loss", "eval_bits_per_byte", "eval_cross_entropy"} <= {name for line in log for name in line}
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "aligned with the teacher's by bytes of the text" in card
    assert "| rows skipped | 0 of 16 |" in card
    folder = tmp_path / "run" / "student"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.get_vocab() == PreTrainedTokenizerFast.from_pretrained(students["more bytes"]).get_vocab()
    ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    # The finished run answers with its stored summary, and one without this path has no such line.
    assert train(found) == summary
    assert "other_tokenizer" in summary.model_dump()
    assert "other_tokenizer" not in summary.model_copy(update={"other_tokenizer": None}).model_dump()


def test_lora_merged_into_a_student_of_another_tokenizer(datasets, students, tmp_path: Path) -> None:
    lora = {"model": str(students["unigram"]), "lora": {"r": 2, "merge": True}}
    train(config(datasets["text"], students["unigram"], tmp_path / "run", student=lora))
    merged = load_file(tmp_path / "run" / "student" / "model.safetensors")
    before = load_file(students["unigram"] / "model.safetensors")
    assert any(not torch.equal(merged[name], before[name]) for name in before)


def test_evaluation_is_the_cross_entropy_of_the_text_in_bits_per_byte(datasets, tokenizers, students, tmp_path) -> None:
    student = students["more bytes"]
    model = LlamaForCausalLM.from_pretrained(student)
    trainer, _ = build(datasets["text"], model, tmp_path, eval_dataset=load_logit_dataset(datasets["text"]))
    found = trainer.evaluate()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizers["more bytes"])
    aligner = trainer.aligned.collator(trainer.train_dataset).aligners[0]
    surprise = text_surprise = tokens = byte_count = 0.0
    for number in range(16):
        text = made.TEXTS[number % len(made.TEXTS)]
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        end = torch.tensor([[tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model(torch.cat([ids, end], 1)).logits[0].log_softmax(1)
        each = -logprobs[:-1].gather(1, torch.cat([ids[:, 1:], end], 1).T)[:, 0]
        # The teacher has no begin, so its first token is no target, nor are the student's tokens of its bytes.
        first = int(aligner.teacher.encode(text).ends[0])
        ends = aligner.student.encode(text).ends
        skipped = 1 + int((ends[:-1] < first).sum())
        surprise += each[skipped:].sum().item()
        text_surprise += each[skipped:-1].sum().item()
        tokens += len(each) - skipped
        byte_count += len(text.encode()) - int(ends[skipped - 1])
    assert found["eval_cross_entropy"] == pytest.approx(surprise / tokens, rel=1e-5)
    assert found["eval_loss"] == found["eval_cross_entropy"]
    assert found["eval_bits_per_byte"] == pytest.approx(text_surprise / byte_count / math.log(2), rel=1e-5)


def test_the_weights_and_the_temperature_change_the_loss(datasets, students, tmp_path: Path) -> None:
    weights = []
    for options in ({}, {"one_to_one": 0.0}, {"temperature": 1.0}):
        run_config = config(
            datasets["text"], students["unigram"], tmp_path / str(len(weights)), data={"other_tokenizer": options}
        )
        train(run_config)
        weights.append(load_file(tmp_path / str(len(weights)) / "student" / "model.safetensors")["lm_head.weight"])
    for n, one in enumerate(weights):
        for other in weights[:n]:
            assert not torch.equal(one, other)
    identity = json.loads((tmp_path / "0" / "run.json").read_text())
    assert "other_tokenizer" not in identity["data"]
    assert json.loads((tmp_path / "1" / "run.json").read_text())["data"]["other_tokenizer"]["one_to_one"] == 0


REFUSED = {
    "pack_length": {"training": {"pack_length": 64}},
    "loss.tail": {"loss": {"name": "taid", "tail": "mass_corrected"}},
    "data.other_tokenizer": {"data": {"other_tokenizer": {"one_to_one": 0, "chunks": 0}}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_such_a_student_cannot_be_trained_with_is_a_named_error(what, datasets, students, tmp_path: Path) -> None:
    with pytest.raises(OtherTokenizerUnsupported, match=f"^{what}.*for a student with another tokenizer"):
        train(config(datasets["text"], students["pieces"], tmp_path, **REFUSED[what]))


@pytest.mark.parametrize("metric", ["forward_kl_lower_bound", "perplexity", "bits_per_byte"])
def test_another_metric_is_refused_with_one_that_is_accepted(metric, datasets, students, tmp_path: Path) -> None:
    dataset = load_logit_dataset(datasets["text"])

    def build_with(name: str, evaluated: Any) -> DistillTrainer:
        args = arguments(
            tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model=name, save_steps=1,
            save_strategy="steps", load_best_model_at_end=True,
        )  # fmt: skip
        return DistillTrainer(str(students["pieces"]), args, train_dataset=dataset, eval_dataset=evaluated)

    for evaluated in (dataset, {"part": dataset}):
        with pytest.raises(UnknownMetric, match="that this run measures") as caught:
            build_with(metric, evaluated)
        assert "perplexity" not in str(caught.value).replace(f"found:  {metric}", "")
        build_with(str(caught.value).split()[-1], evaluated)


def test_rows_that_are_no_chats_of_the_template_are_a_named_error(tokenizers, students, tmp_path: Path) -> None:
    teacher = tokenizers["bytes"]
    dataset = made.write(tmp_path / "data", made.text_rows(teacher), teacher, chat=True)
    with pytest.raises(TokenizerNotAligned, match=r"(?s)16 rows are skipped.*cannot be proven from its tokens"):
        train(config(dataset, students["pieces"], tmp_path / "run"))


def test_a_tokenizer_that_loses_bytes_is_a_named_error(datasets, tmp_path: Path) -> None:
    student = made.student(tmp_path / "student", made.word_piece(tmp_path / "tokenizer"))
    with pytest.raises(TokenizerNotAligned, match=r"(?s)tokenizer of the student .*WordPiece"):
        train(config(datasets["text"], student, tmp_path / "run"))


def test_single_rows_that_cannot_be_aligned_are_skipped_counted_and_named(
    tokenizers, students, tmp_path: Path, told: list[str]
) -> None:
    teacher = tokenizers["bytes"]
    rows = made.text_rows(teacher, 12)
    # The begin of a turn is in the middle of their text.
    rows[5:6] = [made.text_row(n, [70, 71, 1, 72, 73], np.arange(5) > 0, vocabulary=300) for n in (90, 91)]
    dataset = made.write(tmp_path / "data", rows, teacher)
    summary = train(
        config(
            dataset, students["pieces"], tmp_path / "run", training={"batch_size": 1, "epochs": 1, "logging_steps": 1}
        )
    )
    assert summary.other_tokenizer["skipped_rows"] == 2
    assert {line.split("'")[1] for line in told if line.startswith("row ")} == {"row-90", "row-91"}
    assert "2 rows are skipped (2: it has a special token in its text" in told[0]


def test_datasets_of_text_and_of_chats_are_mixed(datasets, students, tmp_path: Path) -> None:
    found = config(datasets["text"], students["more bytes"], tmp_path / "run").model_dump()
    summary = train(TrainConfig.model_validate({**found, "dataset": [str(datasets["text"]), str(datasets["chat"])]}))
    assert summary.other_tokenizer["rows"] == 32
    assert summary.other_tokenizer["skipped_rows"] == 0


def test_alm_brings_the_student_to_the_teacher_s_chunks(datasets, students, tmp_path: Path) -> None:
    """Trained on chunks alone, the student's chunks get the teacher's probability."""
    output = tmp_path / "run"
    options = {"other_tokenizer": {"one_to_one": 0.0}}
    long = {"batch_size": 16, "max_steps": 40, "learning_rate": 1e-2, "logging_steps": 1}
    train(config(datasets["text"], students["unigram"], output, data=options, training=long))
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [line["chunk_loss"] for line in log if "chunk_loss" in line]
    assert losses[-1] < 0.2 * losses[0]
