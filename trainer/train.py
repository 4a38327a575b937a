"""One training run: trains the student of a `TrainConfig`, writes it, and returns a `TrainSummary`.

After an interruption, the same call resumes from the newest complete checkpoint. After the end of the run, it returns
the stored summary. The teacher is never loaded; everything about it comes from the dataset.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer
from transformers import TrainerCallback, TrainingArguments, set_seed

from coldstill.common.files import SUMMARY_NAME, write_json
from coldstill.common.interrupts import raising_interrupts
from coldstill.common.models import FrozenModel
from coldstill.storage_schema.store import require_folder

from .alignment.objective import alignment_counts
from .arguments import validate_optimizer
from .checkpoints import Checkpoint, EarlyStopping, claim, naming_failed_writes, newest_checkpoint
from .config import FREE_TRAINING_SETTINGS, OtherTokenizerConfig, TrainConfig
from .data.logit_dataset import LogitDataset, load_logit_dataset
from .distill_trainer import DistillTrainer
from .evaluation.report import measured_metrics
from .finished_student import push_student, write_student
from .interruption import CheckpointOnSignal
from .losses import run_identity
from .run_report.callback import RunReport
from .run_report.facts import RunFacts
from .step_record import figures_of


class TrainSummary(FrozenModel):
    """Facts of a finished run. Targets, seconds and memory cover all its starts.

    `teachers`: name of the teacher of each dataset. `steps`: optimizer steps of the run. `student_step`: the step of
    the checkpoint that became the student. `peak_memory_mb`: in MiB, of the GPU if there is one, else resident memory.
    `taid_t`: t at the end, None without it.
    `other_tokenizer`: `AlignmentCounts` of a student with another tokenizer than the dataset's; left out for any other.
    """

    dataset_ids: list[str]
    teachers: list[str] = []
    loss: str
    steps: int
    student_step: int
    targets: int
    targets_per_s: float
    wall_s: float
    peak_memory_mb: float
    taid_t: float | None
    other_tokenizer: dict[str, int | float] | None = None

    @model_serializer(mode="wrap")
    def _without_unused(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = fields(self)
        return {name: value for name, value in found.items() if name != "other_tokenizer" or value is not None}


def train(config: TrainConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> TrainSummary:
    """Train the student of `config` on its dataset; `callbacks` are callbacks of transformers.

    Under torchrun or accelerate launch, each process trains on its share of every step, and the first process writes.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint and raise `Interrupted`. Raises the errors of `load_logit_dataset`,
    `load_student` and `DistillTrainer`, and `CheckpointMismatch`, `NonFiniteLoss`, `StorageFull`,
    `StudentDiffers`.
    """
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    args = _arguments(config)
    output = Path(config.output)
    require_folder(config.output)
    dataset = load_logit_dataset(config.dataset, **config.data.model_dump(exclude={"seed", "other_tokenizer"}))
    with naming_failed_writes(output):
        claim(output, _identity(config, dataset), write=args.process_index == 0)
    if (output / SUMMARY_NAME).exists():
        return TrainSummary.model_validate_json((output / SUMMARY_NAME).read_bytes())

    report = RunReport(config.output, lambda: RunFacts.of_config(config, dataset), write=args.process_index == 0)
    with report, naming_failed_writes(output):
        checkpoint = newest_checkpoint(output)
        if checkpoint is None or not checkpoint.finished:
            _run(config, dataset, args, checkpoint, callbacks, report)
            checkpoint = newest_checkpoint(output)
            assert checkpoint is not None
        summary = _summary(config, dataset, checkpoint)
        with args.main_process_first(local=False):
            if args.process_index == 0:
                write_student(config, dataset, checkpoint)
                if config.training.push_to_hub is not None:
                    push_student(output, config.training.push_to_hub)
                # Before the summary: after it, no start of the run writes again.
                report.finish(checkpoint.state, summary.model_dump())
                write_json(output / SUMMARY_NAME, summary.model_dump(), sort_keys=True)
    return summary


def _run(
    config: TrainConfig,
    dataset: LogitDataset,
    args: TrainingArguments,
    checkpoint: Checkpoint | None,
    callbacks: Sequence[TrainerCallback],
    report: RunReport,
) -> None:
    """Train from `checkpoint` to the end. No model or optimizer is left in memory afterwards."""
    on_signal = CheckpointOnSignal(grace_s=config.training.grace_s, saved_step=checkpoint.step if checkpoint else 0)
    with raising_interrupts(), on_signal:
        trainer = _build(config, dataset, args, [*callbacks, report, on_signal])
        trainer.train(resume_from_checkpoint=checkpoint)
    del trainer
    gc.collect()
    torch.cuda.empty_cache()


def _build(
    config: TrainConfig, dataset: LogitDataset, args: TrainingArguments, callbacks: Sequence[TrainerCallback]
) -> DistillTrainer:
    # Randomly initialized weights, such as a head that the file lacks, must be equal at each start.
    set_seed(config.training.seed)
    patience = config.training.early_stopping_patience
    return DistillTrainer(
        config.student,
        args,
        train_dataset=dataset,
        loss=config.loss,
        pack_length=config.training.pack_length,
        report=False,  # the report of `train` covers the making of the finished student too
        other_tokenizer=config.data.other_tokenizer,
        eval_dataset=None
        if config.eval_dataset is None
        else load_logit_dataset(
            config.eval_dataset, **config.data.model_dump(include={"rows", "cache_dir", "cache_bytes"})
        ),
        callbacks=[*callbacks, *([] if patience is None else [EarlyStopping(patience)])],
    )


def _arguments(config: TrainConfig) -> TrainingArguments:
    training = config.training
    best = training.best_metric
    validate_optimizer(training.optimizer)
    return TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        optim=training.optimizer,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        num_train_epochs=training.epochs,
        max_steps=-1 if training.max_steps is None else training.max_steps,
        logging_steps=training.logging_steps,
        eval_strategy="no" if config.eval_dataset is None else "steps",
        eval_steps=training.eval_steps,
        metric_for_best_model=training.best_metric,
        greater_is_better=measured_metrics(None).get(best.removeprefix("eval_")) == "higher" if best else None,
        load_best_model_at_end=best is not None,
        save_strategy="steps",
        # Each measurement needs its checkpoint, so that the best one exists at the end.
        save_steps=training.eval_steps if best else training.save_steps,
        # Two: if the run is killed while it writes a checkpoint, the older one is still complete.
        save_total_limit=2,
        seed=training.seed,
        data_seed=config.data.seed,
        report_to=training.report_to,
        bf16=config.student.dtype == "bfloat16",
        gradient_checkpointing=config.student.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=training.dataloader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _identity(config: TrainConfig, dataset: LogitDataset) -> dict[str, Any]:
    """Everything that determines the weights. A run resumes from a checkpoint only if their identities are equal."""
    # Runs of earlier releases, which had no such settings, resume.
    later = {"freeze"} if not config.student.freeze else set()
    of_data = {"seed", "weights", "top_k", "draws"} | ({"rows"} if config.data.rows != "all" else set())
    # The weights in use, so that a run by the default and one that names it are the same.
    ensemble = {"ensemble_weights": list(dataset.ensemble_weights)} if dataset.ensemble_weights else {}
    if config.data.other_tokenizer != OtherTokenizerConfig():
        of_data.add("other_tokenizer")
    return {
        "dataset_ids": list(dataset.dataset_ids),
        "student": config.student.model_dump(exclude={"gradient_checkpointing", *later}),
        "loss": run_identity(config.loss),
        "data": config.data.model_dump(include=of_data) | ensemble,
        "training": config.training.model_dump(exclude=set(FREE_TRAINING_SETTINGS)),
    }


def _summary(config: TrainConfig, dataset: LogitDataset, last: Checkpoint) -> TrainSummary:
    record = last.record
    return TrainSummary(
        dataset_ids=list(dataset.dataset_ids),
        teachers=[source.header.teacher.name for source in dataset.all_datasets],
        loss=config.loss.name,
        steps=last.step,
        student_step=last.best.step,
        other_tokenizer=alignment_counts(record),
        **figures_of(record),
    )
