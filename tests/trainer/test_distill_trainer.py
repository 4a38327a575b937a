"""What `DistillTrainer` adds to transformers' Trainer: alignment, exact sums, t per optimizer step, errors in time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from storage_schema import CachedRow, Dataset, open_dataset
from storage_schema.rows import spans_from_mask
from tests import making
from trainer.config import LossConfig
from trainer.data import StreamingRows, collate
from trainer.distill_trainer import DistillTrainer
from trainer.errors import NonFiniteLoss
from trainer.losses import build_loss, build_schedule


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step, and t after it."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        self.steps.append(torch.cat([weight.grad.flatten().clone() for weight in model.parameters()]))


def build(dataset: Path | Dataset, student: Path, output: Path, *, loss: LossConfig | None = None, **arguments):
    """A trainer on the tiny parts; returns it and its gradients."""
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    loss = loss or LossConfig()
    fields = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "accelerator_config": {"dispatch_batches": False},
    }
    gradients = Gradients()
    trainer = DistillTrainer(
        LlamaForCausalLM.from_pretrained(student),
        TrainingArguments(output_dir=str(output), **{**fields, **arguments}),
        train_dataset=StreamingRows(dataset, seed=0),
        loss=build_loss(loss, draws=dataset.header.draws),
        schedule=build_schedule(loss),
        callbacks=[gradients],
    )
    return trainer, gradients


def one_batch(trainer: DistillTrainer, rows: list[CachedRow]) -> float:
    """Mean loss per target of `rows` in one batch, in evaluation."""
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, collate(rows)).item()


def taught_by(model: LlamaForCausalLM, rng: np.random.Generator, sample_id: str, *, top_k: int) -> CachedRow:
    """A row whose teacher is `model` itself, made without any code of the trainer."""
    tokens = rng.integers(0, making.VOCABULARY, int(rng.integers(5, 20)), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, :-1]
    probs = logits.double().softmax(-1).numpy()
    return CachedRow(
        sample_id=sample_id,
        token_ids=tokens,
        target_spans=spans_from_mask(np.ones(tokens.size, bool)),
        targets=making.targets_of(probs, tokens[1:], top_k=top_k),
    )


@pytest.mark.parametrize("top_k", [8, making.VOCABULARY])
def test_a_student_taught_by_itself_has_nothing_to_learn_and_a_shift_by_one_would_show(
    tiny_dataset, tiny_student, tmp_path, top_k
):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss=LossConfig(name="forward_kl"))
    rng = np.random.default_rng(0)
    rows = [taught_by(trainer.model.eval(), rng, f"r{n}", top_k=top_k) for n in range(5)]
    assert one_batch(trainer, rows) == pytest.approx(0, abs=1e-6)
    batch = collate(rows)
    batch["targets"].position.add_(1)
    assert trainer.compute_loss(trainer.model, batch).item() > 1e-4


def test_the_loss_depends_on_which_position_a_distribution_belongs_to(tiny_dataset, tiny_student, tmp_path):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss=LossConfig(name="forward_kl"))
    batch = collate(open_dataset(tiny_dataset).read_shard(0))
    before = trainer.compute_loss(trainer.model.eval(), batch).item()
    batch["targets"].logprobs.copy_(batch["targets"].logprobs.flip(0))
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("name", ["taid", "forward_kl", "cross_entropy"])
def test_padding_does_not_change_the_loss(tiny_dataset, tiny_student, tmp_path, name):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss=LossConfig(name=name))
    rows = open_dataset(tiny_dataset).read_shard(0)
    alone = [(one_batch(trainer, [row]), row.positions.size) for row in rows]
    mean = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert one_batch(trainer, rows) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("name", ["taid", "forward_kl", "cross_entropy"])
def test_accumulation_changes_neither_gradient_nor_t(tiny_dataset, tiny_student, tmp_path, name):
    loss = LossConfig(name=name, alpha=0.1)
    shapes = [(8, 1), (2, 4), (1, 8), (4, 2)]
    runs = []
    for batch, accumulation in shapes:
        trainer, gradients = build(
            tiny_dataset,
            tiny_student,
            tmp_path / str(batch),
            loss=loss,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        runs.append((trainer, gradients))
    whole, wanted = runs[0]
    assert len(wanted.steps) == 3
    for trainer, gradients in runs[1:]:
        for got, want in zip(gradients.steps, wanted.steps, strict=True):
            assert torch.linalg.norm(got - want) <= 2e-3 * torch.linalg.norm(want)
        torch.testing.assert_close(gradients.steps[0], wanted.steps[0], rtol=1e-4, atol=1e-7)
        for mine, theirs in zip(trainer.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
            for key in {"loss", "bucket_kl", "taid_t", "taid_momentum"} & set(theirs):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6)
        assert trainer.record.targets == whole.record.targets


def test_the_last_step_of_an_epoch_divides_by_its_own_targets(tiny_dataset, tiny_student, tmp_path):
    unequal, gradients = build(
        tiny_dataset,
        tiny_student,
        tmp_path,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=3,
        learning_rate=1e-30,
    )
    unequal.train()
    rows = StreamingRows(open_dataset(tiny_dataset), seed=0)
    last = list(rows)[15:]
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path)
    trainer.model.train()
    trainer.compute_loss(trainer.model, collate(last)).backward()
    wanted = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])
    torch.testing.assert_close(gradients.steps[1], wanted, rtol=1e-3, atol=1e-6)


def test_the_log_carries_the_paper_s_names_and_t_is_of_the_next_step(tiny_dataset, tiny_student, tmp_path):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, num_train_epochs=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 12
    assert all({"loss", "taid_t", "taid_momentum", "bucket_kl"} <= set(line) for line in lines)
    t = [line["taid_t"] for line in lines]
    assert t[0] == 0.4
    assert t == sorted(t)
    assert t[-1] == 1.0
    assert trainer.record.targets == 2 * sum(shard.targets for shard in open_dataset(tiny_dataset).shards)


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_losses_without_a_schedule_log_the_bucket_kl_and_no_t(tiny_dataset, tiny_student, tmp_path, name):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss=LossConfig(name=name))
    trainer.train()
    assert "bucket_kl" in trainer.state.log_history[0]
    assert "taid_t" not in trainer.state.log_history[0]


def test_evaluation_moves_nothing(tiny_dataset, tiny_student, tmp_path):
    class Evaluate(TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            measured.evaluate(StreamingRows(open_dataset(tiny_dataset), seed=9))

        on_substep_end = on_step_begin

    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain, wanted = build(tiny_dataset, tiny_student, tmp_path / "plain", **shape)
    measured, got = build(tiny_dataset, tiny_student, tmp_path / "measured", **shape)
    measured.add_callback(Evaluate())
    plain.train()
    measured.train()
    assert measured.schedule.state_dict() == plain.schedule.state_dict()
    assert measured.record.targets == plain.record.targets
    for mine, theirs in zip(got.steps, wanted.steps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_second_training_starts_its_schedule_anew(tiny_dataset, tiny_student, tmp_path):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path)
    trainer.train()
    trainer.train()
    t = [line["taid_t"] for line in trainer.state.log_history if "taid_t" in line]
    assert t[0] == 0.4


def test_a_loss_that_is_not_finite_names_its_rows_and_stops_before_the_optimizer_moves(
    tiny_dataset, tiny_student, tmp_path
):
    trainer, gradients = build(tiny_dataset, tiny_student, tmp_path, gradient_accumulation_steps=2)
    sick = next(iter(StreamingRows(open_dataset(tiny_dataset), seed=0)))
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[int(sick.token_ids[0])] = torch.nan
    before = [weight.clone() for weight in trainer.model.parameters()]
    with pytest.raises(NonFiniteLoss, match=sick.sample_id):
        trainer.train()
    assert gradients.steps == []
    for was, weight in zip(before, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(weight, was, rtol=0, atol=0, equal_nan=True)


def test_rows_of_the_head_beyond_the_tokenizer_are_left_alone(tiny_dataset, tiny_student, tmp_path):
    narrow, _ = build(tiny_dataset, tiny_student, tmp_path)
    padded, _ = build(tiny_dataset, tiny_student, tmp_path)
    padded.model.resize_token_embeddings(making.VOCABULARY + 16)
    with torch.no_grad():
        padded.model.get_output_embeddings().weight[making.VOCABULARY :] = 5
    rows = open_dataset(tiny_dataset).read_shard(0)
    assert one_batch(padded, rows) == pytest.approx(one_batch(narrow, rows), rel=1e-6)
    padded.compute_loss(padded.model, collate(rows)).backward()
    assert padded.model.get_output_embeddings().weight.grad[making.VOCABULARY :].abs().max() == 0


@pytest.mark.parametrize("field", ["remove_unused_columns", "restore_callback_states_from_checkpoint"])
def test_arguments_that_would_lose_targets_or_state_are_refused(tiny_dataset, tiny_student, tmp_path, field):
    with pytest.raises(ValueError, match=field):
        build(tiny_dataset, tiny_student, tmp_path, **{field: True})
