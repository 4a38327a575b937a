"""A run that was killed goes on as if nothing had been: the same batches, the same t, the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from coldstill.trainer.errors import CheckpointMismatch
from tests import making
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
    """A student with dropout: what is drawn at random must be gone on with too."""
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
    ],
    ids=["rows", "packs", "workers"],
)
def test_killed_anywhere_and_twice_in_one_epoch_the_rest_is_the_same(tiny_dataset, forgetful, tmp_path, shape):
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


def test_a_checkpoint_of_another_order_is_refused_by_name(tiny_dataset, tiny_student, tmp_path):
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


def test_a_checkpoint_of_another_dataset_or_of_no_run_of_ours_is_refused(tiny_dataset, tiny_student, tmp_path):
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
