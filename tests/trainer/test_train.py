"""A whole run from a sealed dataset to a finished student: its files, resuming, and each named error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import (
    DatasetNotFound,
    DatasetNotSealed,
    ShardDamaged,
    StorageFull,
    TokenizerMismatch,
    TokenizerNotFound,
)
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.errors import (
    CheckpointMismatch,
    NoDraws,
    NoTargets,
    StudentHeadTooSmall,
    StudentNotFound,
    UnknownMetric,
)
from coldstill.trainer.step_record import MEASURED
from coldstill.trainer.train import TrainSummary, train
from tests import making
from tests.trainer.training import KillAt, Killed


def make_config(dataset: Path, folder: Path, output: Path, /, **changes) -> TrainConfig:
    training = {"learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2}
    training |= {"logging_steps": 1, "save_steps": 4, "dataloader_workers": 0} | changes.pop("training", {})
    return TrainConfig.model_validate(
        {
            "dataset": str(dataset),
            "output": str(output),
            "student": {"model": str(folder)} | changes.pop("student", {}),
            "training": training,
            **changes,
        }
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output / "student").state_dict()


@pytest.mark.parametrize("name", ["taid", "forward_kl", "cross_entropy"])
def test_a_run_leaves_a_plain_student_its_log_and_its_summary(tiny_dataset, tiny_student, tmp_path, name):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", loss={"name": name})
    summary = train(config)
    dataset = open_dataset(tiny_dataset)
    assert summary.dataset_ids == [dataset.dataset_id]
    assert (summary.loss, summary.steps, summary.student_step) == (name, 12, 12)
    assert summary.targets == 2 * sum(shard.targets for shard in dataset.shards)
    assert summary.targets_per_s == pytest.approx(summary.targets / summary.wall_s, rel=0.01)
    assert summary.peak_memory_mb > 10
    assert summary.taid_t == (1.0 if name == "taid" else None)
    assert TrainSummary.model_validate_json((tmp_path / "run/train_summary.json").read_text()) == summary

    assert AutoTokenizer.from_pretrained(tmp_path / "run/student").vocab_size == making.VOCABULARY
    left = {path.name for path in (tmp_path / "run/student").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= left
    assert not {"optimizer.pt", "trainer_state.json", "training_args.bin"} & left
    card = (tmp_path / "run/student/README.md").read_text()
    assert dataset.dataset_id in card
    assert str(tmp_path) not in card
    before = AutoModelForCausalLM.from_pretrained(tiny_student).state_dict()
    assert any(not torch.equal(before[key], value) for key, value in weights(tmp_path / "run").items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tiny_student, tmp_path / "run/student")]
    assert configs[0] == configs[1]
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log] == list(range(1, 13))


def test_forward_kl_brings_the_student_nearer_to_its_teacher(tiny_dataset, tiny_student, tmp_path):
    more = {"training": {"epochs": 8, "learning_rate": 1e-2}}
    train(make_config(tiny_dataset, tiny_student, tmp_path / "run", loss={"name": "forward_kl"}, **more))
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    kl = [line["bucket_kl"] for line in log if "bucket_kl" in line]
    assert np.mean(kl[-6:]) < 0.8 * np.mean(kl[:6])


def test_a_run_killed_twice_ends_with_the_weights_of_an_uninterrupted_one(tiny_dataset, tiny_student, tmp_path):
    shape = {"max_steps": 10, "batch_size": 3}
    unbroken = train(make_config(tiny_dataset, tiny_student, tmp_path / "unbroken", training=shape))
    config = make_config(tiny_dataset, tiny_student, tmp_path / "broken", training=shape)
    for step in (5, 9):
        with pytest.raises(Killed):
            train(config, callbacks=[KillAt(step)])
    summary = train(config)
    assert (summary.steps, summary.targets, summary.taid_t) == (unbroken.steps, unbroken.targets, unbroken.taid_t)
    wanted = weights(tmp_path / "unbroken")
    for key, value in weights(tmp_path / "broken").items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)
    logs = [
        json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"] for run in ("broken", "unbroken")
    ]
    for mine, theirs in zip(*logs, strict=True):
        unequal = dict.fromkeys(("grad_norm", *MEASURED), 0)
        assert {**mine, **unequal} == {**theirs, **unequal}


def test_an_incomplete_checkpoint_is_skipped(tiny_dataset, tiny_student, tmp_path):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run")
    unbroken = train(make_config(tiny_dataset, tiny_student, tmp_path / "unbroken"))
    with pytest.raises(Killed):
        train(config, callbacks=[KillAt(9)])
    (tmp_path / "run/checkpoint-8/trainer_state.json").write_text('{"global_step": 8, "log_hist')
    assert train(config).targets == unbroken.targets
    wanted = weights(tmp_path / "unbroken")
    assert all(torch.equal(value, wanted[key]) for key, value in weights(tmp_path / "run").items())


def test_killed_between_its_last_step_and_its_summary_it_only_finishes(tiny_dataset, tiny_student, tmp_path):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run")
    summary = train(config)
    wanted = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/student")
    (tmp_path / "run/train_summary.json").unlink()
    assert train(config, callbacks=[KillAt(0)]) == summary
    assert all(torch.equal(value, wanted[key]) for key, value in weights(tmp_path / "run").items())


def test_a_finished_run_returns_its_summary_at_once(tiny_dataset, tiny_student, tmp_path):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run")
    summary = train(config)
    before = (tmp_path / "run/student/model.safetensors").stat().st_mtime_ns
    assert train(config, callbacks=[KillAt(0)]) == summary
    assert (tmp_path / "run/student/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss": {"name": "forward_kl"}}, "loss.name"),
        ({"data": {"seed": 1}}, "data.seed"),
        ({"training": {"learning_rate": 1e-4}}, "training.learning_rate"),
    ],
)
def test_the_checkpoint_of_another_recipe_is_an_error_that_names_the_key(
    tiny_dataset, tiny_student, tmp_path, changes, named
):
    with pytest.raises(Killed):
        train(make_config(tiny_dataset, tiny_student, tmp_path / "run"), callbacks=[KillAt(5)])
    with pytest.raises(CheckpointMismatch, match=f"differs in {named}\n") as error:
        train(make_config(tiny_dataset, tiny_student, tmp_path / "run", **changes))
    section, _, key = named.partition(".")
    assert error.value.wanted == f"{named}: {changes[section][key]}"
    assert error.value.found.startswith(f"{named}: ")
    assert "another output" in error.value.fix


def test_the_checkpoint_of_another_dataset_is_an_error_and_of_a_moved_one_is_not(tiny_dataset, tiny_student, tmp_path):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run")
    summary = train(config)
    moved = tiny_dataset.rename(tmp_path / "moved")
    assert train(make_config(moved, tiny_student, tmp_path / "run")) == summary
    rows = [making.random_row(np.random.default_rng(0), "other")]
    making.write_dataset(tmp_path / "other", [rows], header=making.tiny_header(tiny_student), tokenizer=tiny_student)
    with pytest.raises(CheckpointMismatch, match="differs in dataset_ids"):
        train(make_config(tmp_path / "other", tiny_student, tmp_path / "run"))


def test_save_and_log_intervals_may_change_between_starts(tiny_dataset, tiny_student, tmp_path):
    with pytest.raises(Killed):
        train(make_config(tiny_dataset, tiny_student, tmp_path / "run"), callbacks=[KillAt(5)])
    again = {"training": {"logging_steps": 2, "save_steps": 6, "threads": 1, "dataloader_workers": 1}}
    assert train(make_config(tiny_dataset, tiny_student, tmp_path / "run", **again)).steps == 12


def test_a_head_padded_beyond_the_tokenizer_works_and_keeps_its_rows(tiny_dataset, tmp_path):
    student = making.tiny_llama(tmp_path / "padded", vocabulary=making.VOCABULARY + 10)
    train(make_config(tiny_dataset, student, tmp_path / "run", training={"weight_decay": 0.0}))
    before = AutoModelForCausalLM.from_pretrained(student).state_dict()["lm_head.weight"]
    after = weights(tmp_path / "run")["lm_head.weight"]
    assert torch.equal(after[making.VOCABULARY :], before[making.VOCABULARY :])
    assert not torch.equal(after[: making.VOCABULARY], before[: making.VOCABULARY])


def test_bfloat16_trains_with_float32_weights(tiny_dataset, tiny_student, tmp_path):
    student = {"dtype": "bfloat16", "gradient_checkpointing": True}
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", student=student, training={"max_steps": 2})
    train(config)
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}


def test_a_head_with_too_few_rows_is_a_named_error(tiny_dataset, tmp_path):
    student = making.tiny_llama(tmp_path / "small", vocabulary=making.VOCABULARY - 4)
    making.tiny_tokenizer(student)
    with pytest.raises(StudentHeadTooSmall, match="60 rows") as error:
        train(make_config(tiny_dataset, student, tmp_path / "run"))
    assert "resize_token_embeddings(64)" in error.value.fix


def test_another_tokenizer_on_rows_that_are_no_text_is_a_named_error(tiny_dataset, tmp_path):
    student = making.tiny_llama(tmp_path / "other", vocabulary=making.VOCABULARY - 4)
    with pytest.raises(TokenizerMismatch, match="rows are skipped"):
        train(make_config(tiny_dataset, student, tmp_path / "run"))


def test_a_student_without_tokenizer_or_a_missing_one_is_a_named_error(tiny_dataset, tiny_student, tmp_path):
    bare = Path(shutil.copytree(tiny_student, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(TokenizerNotFound, match=r"tokenizer\.json"):
        train(make_config(tiny_dataset, bare, tmp_path / "run"))
    with pytest.raises(StudentNotFound, match="nowhere"):
        train(make_config(tiny_dataset, tmp_path / "nowhere", tmp_path / "run"))
    empty = making.tiny_tokenizer(tmp_path / "empty")
    with pytest.raises(StudentNotFound, match="empty"):
        train(make_config(tiny_dataset, empty, tmp_path / "run"))


def test_a_dataset_without_targets_is_a_named_error(tiny_student, tmp_path):
    making.write_dataset(tmp_path / "none", [[]], header=making.tiny_header(tiny_student), tokenizer=tiny_student)
    with pytest.raises(NoTargets, match="none"):
        train(make_config(tmp_path / "none", tiny_student, tmp_path / "run"))


def test_errors_of_the_dataset_come_through(tiny_dataset, tiny_student, tmp_path):
    with pytest.raises(DatasetNotFound):
        train(make_config(tmp_path / "nothing", tiny_student, tmp_path / "run"))
    shard = tiny_dataset / open_dataset(tiny_dataset).shards[1].file.name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardDamaged, match=shard.name):
        train(make_config(tiny_dataset, tiny_student, tmp_path / "run"))
    (tiny_dataset / "manifest.json").unlink()
    with pytest.raises(DatasetNotSealed):
        train(make_config(tiny_dataset, tiny_student, tmp_path / "run"))


def test_the_mixture_of_a_dataset_without_draws_is_a_named_error_and_auto_takes_the_bucket(tiny_student, tmp_path):
    rng = np.random.default_rng(0)
    rows = [making.random_row(rng, f"r{n}", draws=0) for n in range(4)]
    header = making.tiny_header(tiny_student, draws=0)
    making.write_dataset(tmp_path / "plain", [rows], header=header, tokenizer=tiny_student)
    with pytest.raises(NoDraws):
        train(make_config(tmp_path / "plain", tiny_student, tmp_path / "run", loss={"tail": "mixture"}))
    assert train(make_config(tmp_path / "plain", tiny_student, tmp_path / "run")).steps == 2


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_leave_a_student_that_plain_libraries_load(tiny_dataset, tiny_student, tmp_path, merge):
    student = {"lora": {"r": 2, "alpha": 4, "merge": merge}, "gradient_checkpointing": True}
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", student=student)
    with pytest.raises(Killed):
        train(config, callbacks=[KillAt(5)])
    assert train(config).steps == 12
    before = AutoModelForCausalLM.from_pretrained(tiny_student).state_dict()
    folder = tmp_path / "run" / ("adapter" if merge else "student")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_student), folder)
    learned = adapted.merge_and_unload().state_dict()
    assert any(not torch.equal(before[key], value) for key, value in learned.items())
    assert torch.equal(before["lm_head.weight"], learned["lm_head.weight"])
    if merge:
        for key, value in weights(tmp_path / "run").items():
            torch.testing.assert_close(value, learned[key])


def test_a_student_from_scratch_learns_with_the_dataset_s_tokenizer(tiny_dataset, tiny_student, tmp_path):
    scratch = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 64}
    student = {"model": None, "from_scratch": {**scratch, "bos_token_id": 0, "eos_token_id": 1}}
    train(make_config(tiny_dataset, tiny_student, tmp_path / "run", student=student))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student")
    assert loaded.get_output_embeddings().weight.shape == (making.VOCABULARY, 16)
    assert AutoTokenizer.from_pretrained(tmp_path / "run/student").vocab_size == making.VOCABULARY


def test_the_best_checkpoint_is_the_student_and_patience_ends_the_run(tiny_dataset, tiny_student, tmp_path):
    # A metric that never improves.
    training = {"epochs": 4, "eval_steps": 2, "best_metric": "eval_teacher_cross_entropy", "early_stopping_patience": 3}
    config = make_config(
        tiny_dataset, tiny_student, tmp_path / "run", training=training, eval_dataset=str(tiny_dataset)
    )
    summary = train(config)
    assert (summary.steps, summary.student_step) == (8, 2)
    best = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in weights(tmp_path / "run").items())
    report = (tmp_path / "run/report.md").read_text()
    assert "taid_t" in report
    assert "eval_loss" in report

    killed = config.model_copy(update={"output": str(tmp_path / "killed")})
    with pytest.raises(Killed):
        train(killed, callbacks=[KillAt(5)])
    resumed = train(killed)
    assert (resumed.steps, resumed.student_step) == (8, 2)
    (tmp_path / "killed/train_summary.json").unlink()
    assert train(killed, callbacks=[KillAt(0)]) == resumed


def test_the_student_of_a_run_has_the_best_value_of_its_metric_and_a_typo_is_named_before_the_first_step(
    tiny_dataset, tiny_student, tmp_path
):
    for metric, best in (("eval_accuracy", max), ("eval_cross_entropy", min)):
        training = {"epochs": 1, "eval_steps": 1, "best_metric": metric, "learning_rate": 1e-2}
        config = make_config(
            tiny_dataset, tiny_student, tmp_path / metric, training=training, eval_dataset=str(tiny_dataset)
        )
        step = train(config).student_step
        log = json.loads((tmp_path / metric / "trainer_state.json").read_text())["log_history"]
        values = {line["step"]: line[metric] for line in log if metric in line}
        assert len(set(values.values())) > 1
        assert values[step] == best(values.values())
    config = make_config(
        tiny_dataset,
        tiny_student,
        tmp_path / "typo",
        training={"best_metric": "eval_accuracies"},
        eval_dataset=str(tiny_dataset),
    )
    with pytest.raises(UnknownMetric, match="to eval_accuracy"):
        train(config, callbacks=[KillAt(0)])


def test_held_out_rows_are_cached_where_the_run_says(tiny_dataset, tiny_student, tmp_path, monkeypatch):
    monkeypatch.setenv("COLDSTILL_CACHE", str(tmp_path / "default"))
    held_out = shutil.copytree(tiny_dataset, tmp_path / "held out")
    shape = {"max_steps": 1, "eval_steps": 1}
    data = {"cache_dir": str(tmp_path / "named")}
    train(
        make_config(tiny_dataset, tiny_student, tmp_path / "run", training=shape, eval_dataset=str(held_out), data=data)
    )
    assert (tmp_path / "named").is_dir()
    assert not (tmp_path / "default").exists()


def test_a_pushed_student_is_on_the_hub_with_its_card(tiny_dataset, tiny_student, tmp_path, hub):
    train(make_config(tiny_dataset, tiny_student, tmp_path / "run", training={"push_to_hub": "me/student"}))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub["me/student"])
    assert b"TAID" in hub["me/student"]["README.md"]


@pytest.mark.slow
def test_a_process_killed_with_sigkill_resumes_to_the_weights_of_an_unbroken_one(tiny_dataset, tiny_student, tmp_path):
    train(make_config(tiny_dataset, tiny_student, tmp_path / "unbroken", training={"threads": 1}))
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run", training={"threads": 1})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = (
        "import os, signal, sys, pathlib\n"
        "from transformers import TrainerCallback\n"
        "from coldstill.trainer.config import TrainConfig\n"
        "from coldstill.trainer.train import train\n"
        "class Kill(TrainerCallback):\n"
        "    def on_substep_end(self, args, state, control, **_):\n"
        "        if state.global_step == 6:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(TrainConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text()), callbacks=[Kill()])\n"
    )
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "config.json")], cwd=root, check=False)
    assert killed.returncode == -9
    train(config)
    wanted = weights(tmp_path / "unbroken")
    assert all(torch.equal(value, wanted[key]) for key, value in weights(tmp_path / "run").items())


def test_a_full_disk_is_a_named_error_and_the_run_resumes_after_space_was_freed(
    tiny_dataset, tiny_student, tmp_path, small_disk
):
    small_disk.resize("500k")
    config = make_config(tiny_dataset, tiny_student, small_disk.path / "run")
    with pytest.raises(StorageFull, match="writing a checkpoint"):
        train(config)
    small_disk.resize("64m")
    train(config)
    train(make_config(tiny_dataset, tiny_student, tmp_path / "unbroken"))
    ours, unbroken = weights(small_disk.path / "run"), weights(tmp_path / "unbroken")
    assert all(torch.equal(ours[key], unbroken[key]) for key in unbroken)
