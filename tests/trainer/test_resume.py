"""A killed run resumes exactly: the same batches, t and weights as an uninterrupted one."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from coldstill import load_logit_dataset
from coldstill.trainer.checkpoints import ResumePoint
from coldstill.trainer.errors import CheckpointMismatch
from tests import making
from tests.trainer.student.families import tiny_of
from tests.trainer.training import KillAt, Killed, Seen, build, weights_of

SHAPE = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
}


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory) -> Path:
    """A student with dropout, whose random numbers must be restored too."""
    folder = making.tiny_llama(tmp_path_factory.mktemp("forgetful"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return folder


def run(dataset: Path, student: Path, output: Path, *, kills: tuple[int, ...] = (), **shape):
    """Rows of each micro-batch and the weights at the end of a run that is killed in its optimizer steps `kills`."""
    seen = Seen()
    for kill in (*kills, None):
        callbacks = [seen] if kill is None else [KillAt(kill), seen]
        trainer, _ = build(
            dataset, LlamaForCausalLM.from_pretrained(student), output, callbacks=callbacks, **{**SHAPE, **shape}
        )
        seen.watch(trainer)
        begun = any(output.glob("checkpoint-*"))
        if kill is None:
            trainer.train(resume_from_checkpoint=begun)
        else:
            with pytest.raises(Killed):
                trainer.train(resume_from_checkpoint=begun)
    return seen.rows, trainer


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 5},
        {"gradient_accumulation_steps": 2, "pack_length": 40},
        {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 3},
        # 24 rows, twice, are 10 micro-batches: the last optimizer step has one.
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
    ],
    ids=["rows", "packs", "workers", "uneven"],
)
def test_a_run_killed_anywhere_and_twice_in_one_epoch_resumes_exactly(tiny_dataset, forgetful, tmp_path, shape):
    wanted, unbroken = run(tiny_dataset, forgetful, tmp_path / "unbroken", **shape)
    steps = unbroken.state.max_steps
    for kills in ((1, 2), (steps // 2, steps - 1)):
        output = tmp_path / str(kills)
        rows, resumed = run(tiny_dataset, forgetful, output, kills=kills, **shape)
        assert rows == wanted
        assert resumed.record.schedule.state_dict() == unbroken.record.schedule.state_dict()
        assert resumed.record.targets == unbroken.record.targets
        for name, weight in weights_of(resumed.model).items():
            torch.testing.assert_close(weight, unbroken.model.state_dict()[name], rtol=0, atol=0)
        shutil.rmtree(output)


def test_a_family_whose_weights_are_saved_under_other_names_resumes_exactly(tiny_dataset, tmp_path):
    """transformers saves the experts of Mixtral one by one and holds them in one tensor; its Trainer only warns."""
    folder = making.tiny_tokenizer(tmp_path / "model")
    tiny_of("mixtral").save_pretrained(folder)
    runs = []
    for name, kill in (("unbroken", None), ("killed", 2)):
        for callbacks in ([[KillAt(kill)]] if kill else []) + [[]]:
            model = AutoModelForCausalLM.from_pretrained(folder)
            trainer, _ = build(tiny_dataset, model, tmp_path / name, callbacks=callbacks, **SHAPE)
            if callbacks:
                with pytest.raises(Killed):
                    trainer.train()
            else:
                trainer.train(resume_from_checkpoint=kill is not None)
        runs.append(weights_of(trainer.model))
    assert not runs[0].keys() <= load_file(tmp_path / "killed/checkpoint-24/model.safetensors").keys()
    for name, weight in runs[1].items():
        assert torch.equal(weight, runs[0][name]), name


def test_a_tied_head_is_not_reported_as_missing_and_another_weight_is(tiny_dataset, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    student = making.tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    shape = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    build(tiny_dataset, student, tmp_path / "run", **shape)[0].train()
    trainer, _ = build(tiny_dataset, student, tmp_path / "run", **shape)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert "missing keys" not in caplog.text
    weights = trainer.model.state_dict()
    kept = {name: weight for name, weight in weights.items() if name not in ("lm_head.weight", "model.norm.weight")}
    trainer._issue_warnings_after_load(trainer.model.load_state_dict(kept, strict=False))
    assert "missing keys" in caplog.text
    assert "['model.norm.weight']" in caplog.text


def test_workers_and_prefetch_change_nothing(tiny_dataset, forgetful, tmp_path):
    shape = {"save_strategy": "no", "num_train_epochs": 1}
    alone, one = run(tiny_dataset, forgetful, tmp_path / "0", **shape)
    helped, other = run(tiny_dataset, forgetful, tmp_path / "2", dataloader_num_workers=2, **shape)
    assert helped == alone
    for name, weight in weights_of(other.model).items():
        torch.testing.assert_close(weight, one.model.state_dict()[name], rtol=0, atol=0)


def test_a_finished_run_takes_no_further_step(tiny_dataset, tiny_student, tmp_path):
    _, done = run(tiny_dataset, tiny_student, tmp_path, max_steps=2)
    seen, again = run(tiny_dataset, tiny_student, tmp_path, max_steps=2)
    assert seen == []
    assert again.state.global_step == done.state.global_step
    for name, weight in weights_of(again.model).items():
        torch.testing.assert_close(weight, done.model.state_dict()[name], rtol=0, atol=0)


def test_a_checkpoint_of_another_order_is_a_named_error(tiny_dataset, tiny_student, tmp_path):
    run(tiny_dataset, tiny_student, tmp_path, max_steps=1)
    for name, changes in {
        "seed": {"data_seed": 1},
        "batch_size": {"per_device_train_batch_size": 3},
        "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
        "pack_length": {"pack_length": 64},
    }.items():
        trainer, _ = build(tiny_dataset, tiny_student, tmp_path, **{**SHAPE, "max_steps": 1, **changes})
        with pytest.raises(CheckpointMismatch, match=f"differs in {name}"):
            trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_dataset_or_tool_is_a_named_error(tiny_dataset, tiny_student, tmp_path):
    run(tiny_dataset, tiny_student, tmp_path / "run", max_steps=1)
    header = making.tiny_header(tiny_student)
    rng = np.random.default_rng(0)
    rows = [making.random_row(rng, f"other-{n}") for n in range(4)]
    making.write_dataset(tmp_path / "other", [rows], header=header, tokenizer=tiny_student)
    trainer, _ = build(tmp_path / "other", tiny_student, tmp_path / "run", **{**SHAPE, "max_steps": 1})
    with pytest.raises(CheckpointMismatch, match="differs in dataset_ids"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(CheckpointMismatch, match="foreign"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "foreign"))


def test_the_loader_of_a_resumed_run_has_the_length_of_the_rest_and_ends_there(tiny_dataset, tiny_student, tmp_path):
    shape = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}
    wanted, unbroken = run(tiny_dataset, tiny_student, tmp_path / "unbroken", **shape)
    assert [len(wanted), unbroken.length.micro_batches, unbroken.state.max_steps] == [10, 10, 4]
    for step, left in ((0, 10), (1, 7), (3, 1)):
        trainer, _ = build(tiny_dataset, tiny_student, tmp_path, **{**SHAPE, **shape})
        cursor = None if step == 0 else cursor_after(tiny_dataset, batches=3 * step)
        trainer._resumed = ResumePoint(step, cursor)
        loader = trainer.get_train_dataloader()
        assert len(loader) == left
        assert [batch["sample_ids"] for batch in loader] == wanted[3 * step :]
    # Trainer would take a length of 0 as unknown and train again.
    trainer._resumed = ResumePoint(4, None)
    assert len(trainer.get_train_dataloader()) == 1


def cursor_after(dataset: Path, *, batches: int) -> dict:
    """The cursor of batch number `batches`, as the first epochs of `SHAPE` have it."""
    stream = load_logit_dataset(dataset).stream(batch_size=5, seed=0)
    return list(islice(stream, batches))[-1]["cursor"]


def test_a_checkpoint_names_no_module_of_this_package(tiny_dataset, tiny_student, tmp_path):
    """Modules move between releases: a checkpoint that named one could not be loaded after a move."""
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    files = [file for file in (tmp_path / "checkpoint-1").rglob("*") if file.is_file()]
    assert {"training_args.bin", "optimizer.pt", "trainer_state.json"} <= {file.name for file in files}
    for file in files:
        data = file.read_bytes()
        for module in (b"coldstill.", b"storage_schema", b"trainer.distill", b"ctrainer\n"):
            assert module not in data, f"{file.name} holds {module!r}"
