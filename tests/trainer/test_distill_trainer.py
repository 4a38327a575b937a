"""What `DistillTrainer` adds to transformers' Trainer: alignment, exact sums, t per optimizer step, early errors."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback, TrainingArguments

from coldstill import DistillTrainer, load_logit_dataset
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch
from coldstill.storage_schema.rows import CachedRow, spans_from_mask
from coldstill.trainer.arguments import RunLength
from coldstill.trainer.data.collate import collate
from coldstill.trainer.errors import NonFiniteLoss, StudentHeadTooSmall
from coldstill.trainer.evaluation.evaluate import evaluate_on_dataset
from coldstill.trainer.loss_kernels.fused_head import LossValues
from coldstill.trainer.losses import read_loss
from coldstill.trainer.step_record import StepRecord
from tests import making
from tests.trainer.training import build, make_sick, mean_loss, weights_of


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
def test_the_loss_of_a_student_against_itself_is_zero_and_a_shift_by_one_is_detected(
    tiny_dataset, tiny_student, tmp_path, top_k
):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss="forward_kl")
    rng = np.random.default_rng(0)
    rows = [taught_by(trainer.model.eval(), rng, f"r{n}", top_k=top_k) for n in range(5)]
    assert mean_loss(trainer, rows) == pytest.approx(0, abs=1e-6)
    batch = collate(rows)
    batch["targets"].position.add_(1)
    assert trainer.compute_loss(trainer.model, batch).item() > 1e-4


def test_the_loss_depends_on_which_position_a_distribution_belongs_to(tiny_dataset, tiny_student, tmp_path):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss="forward_kl")
    batch = collate(open_dataset(tiny_dataset).read_shard(0))
    before = trainer.compute_loss(trainer.model.eval(), batch).item()
    batch["targets"].logprobs.copy_(batch["targets"].logprobs.flip(0))
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("name", ["taid", "forward_kl", "cross_entropy"])
def test_padding_does_not_change_the_loss(tiny_dataset, tiny_student, tmp_path, name):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss=name)
    rows = open_dataset(tiny_dataset).read_shard(0)
    alone = [(mean_loss(trainer, [row]), row.positions.size) for row in rows]
    mean = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert mean_loss(trainer, rows) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("name", ["taid", "cross_entropy"])
def test_accumulation_changes_neither_gradient_nor_t(tiny_dataset, tiny_student, tmp_path, name):
    loss = read_loss({"name": name, "alpha": 0.1 if name == "taid" else None})
    shapes = [(8, 1), (2, 4), (1, 8)]
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


def test_the_last_step_of_a_run_takes_what_is_left_and_divides_by_its_own_targets(tiny_dataset, tiny_student, tmp_path):
    unequal, gradients = build(
        tiny_dataset,
        tiny_student,
        tmp_path,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=3,
        learning_rate=1e-30,
    )
    unequal.train()
    stream = load_logit_dataset(tiny_dataset).stream(batch_size=15, seed=0, epochs=1)
    _, last = list(stream)
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path)
    trainer.record.schedule.t = unequal.state.log_history[0]["taid_t"]
    trainer.model.train()
    trainer.compute_loss(trainer.model, last).backward()
    wanted = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])
    torch.testing.assert_close(gradients.steps[1], wanted, rtol=1e-3, atol=1e-6)
    assert unequal.state.epoch == 1
    assert unequal.record.targets == load_logit_dataset(tiny_dataset).targets


def test_a_run_of_a_part_of_an_epoch_ends_there(tiny_dataset, tiny_student, tmp_path):
    trainer, gradients = build(tiny_dataset, tiny_student, tmp_path, num_train_epochs=1.5)
    trainer.train()
    assert len(gradients.steps) == 9
    assert trainer.state.epoch == 1.5


def test_the_log_uses_the_paper_s_names_and_t_is_that_of_the_next_step(tiny_dataset, tiny_student, tmp_path):
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
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, loss=name)
    trainer.train()
    assert "bucket_kl" in trainer.state.log_history[0]
    assert "taid_t" not in trainer.state.log_history[0]


def test_evaluation_changes_nothing(tiny_dataset, tiny_student, tmp_path):
    class Evaluate(TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            measured.evaluate(load_logit_dataset(tiny_dataset))

        on_substep_end = on_step_begin

    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain, wanted = build(tiny_dataset, tiny_student, tmp_path / "plain", **shape)
    measured, got = build(tiny_dataset, tiny_student, tmp_path / "measured", **shape)
    measured.add_callback(Evaluate())
    plain.train()
    measured.train()
    assert measured.record.schedule.state_dict() == plain.record.schedule.state_dict()
    assert measured.record.targets == plain.record.targets
    for mine, theirs in zip(got.steps, wanted.steps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_second_training_restarts_its_schedule(tiny_dataset, tiny_student, tmp_path):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path)
    trainer.train()
    trainer.train()
    t = [line["taid_t"] for line in trainer.state.log_history if "taid_t" in line]
    assert t[0] == 0.4


def test_a_loss_that_is_not_finite_names_its_rows_and_stops_before_the_optimizer_moves(
    tiny_dataset, tiny_student, tmp_path
):
    trainer, gradients = build(tiny_dataset, tiny_student, tmp_path, gradient_accumulation_steps=2)
    first = next(iter(load_logit_dataset(tiny_dataset).stream(batch_size=4, seed=0)))
    sick = first["sample_ids"][2]
    make_sick(trainer.model, token=int(first["input_ids"][2, 0]))
    before = [weight.clone() for weight in trainer.model.parameters()]
    with pytest.raises(NonFiniteLoss, match=sick):
        trainer.train()
    assert gradients.steps == []
    for was, weight in zip(before, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(weight, was, rtol=0, atol=0)


def test_an_accumulating_step_keeps_no_inputs_of_its_micro_batches(tiny_dataset):
    batch = next(iter(load_logit_dataset(tiny_dataset).stream(batch_size=4, seed=0)))
    batch["images"] = {"pixel_values": torch.zeros(4, 3, 8, 8)}
    inputs = [weakref.ref(each) for each in (batch["input_ids"], batch["images"]["pixel_values"])]
    record = StepRecord(None, None, order={}, length=RunLength.of(TrainingArguments("o"), batches_per_epoch=1))
    zeros = torch.zeros(batch["targets"].count)
    record.add(LossValues(loss=zeros, distillation=zeros, bucket_kl=zeros), batch)
    del batch
    assert [each() for each in inputs] == [None, None]


def test_rows_of_the_head_beyond_the_tokenizer_get_no_gradient(tiny_dataset, tiny_student, tmp_path):
    narrow, _ = build(tiny_dataset, tiny_student, tmp_path)
    padded, _ = build(tiny_dataset, tiny_student, tmp_path)
    padded.model.resize_token_embeddings(making.VOCABULARY + 16)
    with torch.no_grad():
        padded.model.get_output_embeddings().weight[making.VOCABULARY :] = 5
    rows = open_dataset(tiny_dataset).read_shard(0)
    assert mean_loss(padded, rows) == pytest.approx(mean_loss(narrow, rows), rel=1e-6)
    padded.compute_loss(padded.model, collate(rows)).backward()
    assert padded.model.get_output_embeddings().weight.grad[making.VOCABULARY :].abs().max() == 0


@pytest.mark.parametrize("field", ["auto_find_batch_size", "restore_callback_states_from_checkpoint"])
def test_arguments_that_would_lose_state_are_errors(tiny_dataset, tiny_student, tmp_path, field):
    with pytest.raises(ValueError, match=field):
        build(tiny_dataset, tiny_student, tmp_path, **{field: True})


def test_five_lines_of_a_notebook_train_a_student_and_leave_its_arguments_alone(tiny_dataset, tiny_student, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    before = weights_of(model)
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", num_train_epochs=1)
    DistillTrainer(model, args, train_dataset=load_logit_dataset(tiny_dataset)).train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(model).items())
    assert (args.max_steps, args.remove_unused_columns, args.ignore_data_skip) == (-1, True, False)
    assert model.config.use_cache is True


def test_a_student_can_be_given_by_name(tiny_dataset, tiny_student, tmp_path):
    trainer = DistillTrainer(
        str(tiny_student),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=load_logit_dataset(tiny_dataset),
    )
    assert isinstance(trainer.model, LlamaForCausalLM)


def test_a_tokenizer_or_a_head_that_does_not_fit_is_a_named_error(tiny_dataset, tiny_student, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    other = AutoTokenizer.from_pretrained(making.tiny_tokenizer(tmp_path / "other", vocabulary=60))
    dataset = load_logit_dataset(tiny_dataset)
    with pytest.raises(TokenizerMismatch):
        DistillTrainer(str(tiny_student), args, train_dataset=dataset, processing_class=other)
    right = AutoTokenizer.from_pretrained(tiny_student)
    DistillTrainer(str(tiny_student), args, train_dataset=dataset, processing_class=right)
    small = LlamaForCausalLM.from_pretrained(making.tiny_llama(tmp_path / "small", vocabulary=60))
    with pytest.raises(StudentHeadTooSmall):
        DistillTrainer(small, args, train_dataset=dataset, processing_class=right)


def test_a_measurement_has_what_best_model_and_early_stopping_look_for(tiny_dataset, tiny_student, tmp_path):
    dataset = load_logit_dataset(tiny_dataset)
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path, eval_dataset={"a": dataset, "b": dataset})
    found = trainer.evaluate()
    assert found["eval_a_loss"] == found["eval_b_loss"] > 0
    assert {"eval_a_cross_entropy", "eval_a_top1_agreement", "eval_a_runtime"} <= set(found)
    taught_labels, _ = build(tiny_dataset, tiny_student, tmp_path, eval_dataset=dataset, loss="cross_entropy")
    plain = taught_labels.evaluate()
    assert plain["eval_loss"] == plain["eval_cross_entropy"] == pytest.approx(found["eval_a_cross_entropy"])
    assert taught_labels.state.log_history[-1]["eval_loss"] == plain["eval_loss"]


def test_strategies_by_epoch_are_kept(tiny_dataset, tiny_student, tmp_path):
    trainer, _ = build(
        tiny_dataset,
        tiny_student,
        tmp_path,
        num_train_epochs=3,
        eval_dataset=load_logit_dataset(tiny_dataset),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert [line["epoch"] for line in trainer.state.log_history if "eval_loss" in line] == [1, 2, 3]
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (12, 18, 6)]
    assert trainer.state.best_model_checkpoint is not None


def test_the_card_of_a_pushed_student_names_dataset_loss_and_t(tiny_dataset, tiny_student, tmp_path):
    trainer, _ = build(tiny_dataset, tiny_student, tmp_path)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for fact in (open_dataset(tiny_dataset).dataset_id, "TAID (arXiv 2501.16937), tail: mixture |", "1.0000", "tiny"):
        assert fact in card


def test_push_to_hub_pushes_checkpoints_in_training_and_the_card_at_the_end(tiny_dataset, tiny_student, tmp_path, hub):
    trainer, _ = build(
        tiny_dataset,
        tiny_student,
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id="me/student",
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    assert "model.safetensors" in hub["me/student"]
    assert "README.md" not in hub["me/student"]
    trainer.push_to_hub()
    assert open_dataset(tiny_dataset).dataset_id.encode() in hub["me/student"]["README.md"]
    (tmp_path / "pushed").mkdir()
    for name, data in hub["me/student"].items():
        (tmp_path / "pushed" / name).write_bytes(data)
    pushed, trained = LlamaForCausalLM.from_pretrained(tmp_path / "pushed").state_dict(), trainer.model.state_dict()
    assert all(torch.equal(pushed[name], weight) for name, weight in trained.items())


class Averaged(torch.optim.SGD):
    """As schedule-free optimizers do, it trains at other weights than those that are used: here 0.25 larger ones."""

    training = False

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def _move(self, training: bool) -> None:
        if training != self.training:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.add_(0.25 if training else -0.25)
            self.training = training


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("package", ["", "schedulefree"])
def test_a_schedule_free_student_is_measured_and_saved_at_the_weights_it_is_used_with(
    tiny_dataset, tiny_student, tmp_path, package, best
):
    changes = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    if package:
        pytest.importorskip(package)
    else:
        changes = {"optimizer_cls_and_kwargs": (Averaged, {"lr": 1e-3})}
    dataset = load_logit_dataset(tiny_dataset)
    trainer, _ = build(
        dataset,
        tiny_student,
        tmp_path,
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=best,
        **changes,
    )
    trainer.train()
    measured = {line["step"]: line["eval_cross_entropy"] for line in trainer.state.log_history if "eval_loss" in line}
    for step, value in measured.items():
        saved = LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert evaluate_on_dataset(saved, tiny_dataset).cross_entropy == pytest.approx(value, rel=1e-6)
    last = trainer.state.best_global_step if best else 6
    assert all(
        torch.equal(weight, LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{last}").state_dict()[name])
        for name, weight in trainer.model.state_dict().items()
    )
    trainer.save_model(str(tmp_path / "end"))
    ended = LlamaForCausalLM.from_pretrained(tmp_path / "end").state_dict()
    assert all(torch.equal(weight, ended[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", ["accuracy", "eval_cross_entropy"])
def test_the_best_checkpoint_has_the_best_value(tiny_dataset, tiny_student, tmp_path, name):
    dataset = load_logit_dataset(tiny_dataset)
    trainer, _ = build(
        dataset,
        tiny_student,
        tmp_path,
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        learning_rate=1e-2,
        num_train_epochs=2,
        metric_for_best_model=name,
        load_best_model_at_end=True,
    )
    trainer.train()
    key = f"eval_{name.removeprefix('eval_')}"
    values = {line["step"]: line[key] for line in trainer.state.log_history if key in line}
    best = (max if name == "accuracy" else min)(values.values())
    assert len(set(values.values())) > 1
    assert values[trainer.state.best_global_step] == best
    assert trainer.evaluate()[key] == pytest.approx(best, rel=1e-6)
