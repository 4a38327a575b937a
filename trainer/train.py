"""One training run: a checked `TrainConfig` comes in, a finished student and a `TrainSummary` go out.

Started again after a kill, it goes on from its newest whole checkpoint; started again after its end, it returns the
summary at once. The teacher is never loaded: all that is known of it comes from the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import TrainerCallback, TrainingArguments, set_seed

from storage_schema import Dataset, open_dataset

from .config import TrainConfig
from .data import StreamingRows
from .distill_trainer import DistillTrainer
from .errors import NoTargets
from .losses import build_loss, build_schedule
from .run_folder import SUMMARY_NAME, Checkpoint, claim, finish, full_disk_named, newest_checkpoint, write_json
from .step_record import STATE_NAME
from .student import load_student


class TrainSummary(BaseModel):
    """What a run was and what it took; over all its starts, if it was killed between."""

    model_config = ConfigDict(frozen=True)

    dataset_id: str
    loss: str
    steps: int
    targets: int
    targets_per_s: float
    wall_s: float
    peak_memory_mb: float
    taid_t: float | None


def train(config: TrainConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> TrainSummary:
    """Train the student of `config` on its dataset; `callbacks` are transformers' own, for whoever wants to look on.

    Raises the errors of `open_dataset`, of `load_student` and of `build_loss`, and `NoTargets`, `CheckpointMismatch`,
    `NonFiniteLoss`, `StorageFull`.
    """
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    output = Path(config.output)
    dataset = open_dataset(config.dataset)
    if sum(shard.targets for shard in dataset.shards) == 0:
        raise NoTargets(
            f"dataset {config.dataset}",
            found=f"{len(dataset)} rows without a target position",
            wanted="at least one",
            fix="capture again; see the dataset's rejects/ for why no row was usable",
        )
    claim(output, _identity(config, dataset.dataset_id))
    if (output / SUMMARY_NAME).exists():
        return TrainSummary.model_validate_json((output / SUMMARY_NAME).read_bytes())

    checkpoint = newest_checkpoint(output)
    with full_disk_named(output):
        if checkpoint is None or not checkpoint.finished:
            trainer = _build(config, dataset, callbacks)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
            checkpoint = newest_checkpoint(output)
            assert checkpoint is not None
        finish(output, checkpoint, student=config.student.model)
    summary = _summary(config, dataset.dataset_id, checkpoint)
    write_json(output / SUMMARY_NAME, summary.model_dump())
    return summary


def _build(config: TrainConfig, dataset: Dataset, callbacks: Sequence[TrainerCallback]) -> DistillTrainer:
    # What a student may have to draw at random, for instance a head that its file lacks, must not differ by start.
    set_seed(config.training.seed)
    model = load_student(config.student.model, dataset.header)
    return DistillTrainer(
        model,
        _arguments(config, use_cache=getattr(model.config, "use_cache", True)),
        train_dataset=StreamingRows(dataset, seed=config.data.seed),
        loss=build_loss(config.loss, draws=dataset.header.draws),
        schedule=build_schedule(config.loss),
        callbacks=list(callbacks),
    )


def _arguments(config: TrainConfig, *, use_cache: bool) -> TrainingArguments:
    training = config.training
    return TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        num_train_epochs=training.epochs,
        max_steps=-1 if training.max_steps is None else training.max_steps,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_steps,
        # Two: a kill while the newer one is written leaves the older one whole.
        save_total_limit=2,
        seed=training.seed,
        report_to=training.report_to,
        bf16=config.student.dtype == "bfloat16",
        gradient_checkpointing=config.student.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        # Written into the saved student's configuration, where the student's own setting belongs.
        use_cache=use_cache,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["labels"],
        # Each device reads its own rows; else one device would read for all and cut `SparseTargets` like a tensor.
        accelerator_config={"dispatch_batches": False},
    )


def _identity(config: TrainConfig, dataset_id: str) -> dict[str, Any]:
    """All that decides the weights: a checkpoint is only ever gone on with under an equal identity."""
    training = config.training.model_dump(exclude={"logging_steps", "save_steps", "report_to", "threads"})
    return {
        "dataset_id": dataset_id,
        "student": config.student.model_dump(exclude={"gradient_checkpointing"}),
        "loss": config.loss.model_dump(),
        "data": config.data.model_dump(),
        "training": training,
    }


def _summary(config: TrainConfig, dataset_id: str, checkpoint: Checkpoint) -> TrainSummary:
    record = checkpoint.state["stateful_callbacks"][STATE_NAME]["attributes"]
    return TrainSummary(
        dataset_id=dataset_id,
        loss=config.loss.name,
        steps=checkpoint.state["global_step"],
        targets=record["targets"],
        targets_per_s=round(record["targets"] / record["seconds"], 1),
        wall_s=round(record["seconds"], 3),
        peak_memory_mb=round(record["peak_memory_mb"], 1),
        taid_t=None if record["schedule"] is None else record["schedule"]["t"],
    )
