"""Parts of tests that train: a tiny trainer, and callbacks that record or kill a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from coldstill import DistillTrainer, load_logit_dataset
from coldstill.trainer.data.collate import collate
from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.sharding import whole

OURS = ("loss", "pack_length", "fused_head", "eval_dataset", "optimizer_cls_and_kwargs", "report")
"""Parameters of `DistillTrainer` that a test sets through `build`."""


class Gradients(TrainerCallback):
    """Records the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        learned = [whole(weight.grad).flatten().clone() for weight in model.parameters() if weight.grad is not None]
        if learned:  # a step without targets has no gradient
            self.steps.append(torch.cat(learned))


class Killed(Exception):
    """Stands in for the end of the process."""


class KillAt(TrainerCallback):
    """Ends the run within an optimizer step, after a number of complete ones."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise Killed


class Seen(TrainerCallback):
    """Records the row names of every micro-batch whose optimizer step was taken."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def watch(self, trainer: DistillTrainer) -> None:
        inner = trainer.get_batch_samples

        def watched(*args: Any) -> Any:
            batches, count = inner(*args)
            self._open = [batch["sample_ids"] for batch in batches]
            return batches, count

        trainer.get_batch_samples = watched

    def on_step_end(self, args, state, control, **_) -> None:
        self.rows += self._open


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    """Small, quiet and without a GPU."""
    fields = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "data_seed": 0,
    }
    return TrainingArguments(output_dir=str(output), **{**fields, **changes})


def build(
    dataset: Path | LogitDataset, student: Path | torch.nn.Module, output: Path, *, callbacks: Any = (), **changes: Any
) -> tuple[DistillTrainer, Gradients]:
    """A trainer on the tiny parts, and its gradients; `changes` are of `DistillTrainer` or of its arguments."""
    ours = {name: changes.pop(name) for name in OURS if name in changes}
    gradients = Gradients()
    model = LlamaForCausalLM.from_pretrained(student) if isinstance(student, Path) else student
    trainer = DistillTrainer(
        model,
        arguments(output, **changes),
        train_dataset=load_logit_dataset(dataset) if isinstance(dataset, Path) else dataset,
        callbacks=[gradients, *callbacks],
        **ours,
    )
    return trainer, gradients


def make_sick(model: torch.nn.Module, *, token: int) -> None:
    """Let rows with this token have logits that are not finite, though each weight is."""

    def spoil(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == token)[..., None], torch.nan)

    model.get_input_embeddings().register_forward_hook(spoil)


def mean_loss(trainer: DistillTrainer, rows: list[Any]) -> float:
    """Mean loss per target of `rows` in one batch, in evaluation."""
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, collate(rows)).item()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of its weights, whole if they are sharded."""
    return {name: whole(weight.detach()).clone() for name, weight in model.state_dict().items()}
