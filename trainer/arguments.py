"""Adapts transformers' `TrainingArguments` to an endless stream of batches, rejects those without effect, and counts
the steps of a run."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from .errors import UnknownMetric, UnsupportedArgument
from .evaluation.report import Better, measured_metrics

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """How long a run is.

    `batches_per_epoch`: of all `devices` together. `accumulation`: micro-batches of one optimizer step on one device.
    `micro_batches`: of the run on one device. `steps`: optimizer steps of the run.

    One optimizer step may contain micro-batches of two epochs. Only the last step of the run may have fewer.
    """

    batches_per_epoch: int
    devices: int
    accumulation: int
    micro_batches: int
    steps: int

    @classmethod
    def of(cls, args: TrainingArguments, *, batches_per_epoch: int) -> RunLength:
        """Computed from `max_steps` if it is set, else from `num_train_epochs`."""
        accumulation = args.gradient_accumulation_steps
        if args.max_steps > 0:
            micro_batches = args.max_steps * accumulation
        else:
            micro_batches = math.ceil(math.ceil(args.num_train_epochs * batches_per_epoch) / args.world_size)
        return cls(
            batches_per_epoch=batches_per_epoch,
            devices=args.world_size,
            accumulation=accumulation,
            micro_batches=micro_batches,
            steps=math.ceil(micro_batches / accumulation),
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, rounded, at least one."""
        return max(1, round(self.batches_per_epoch / (self.devices * self.accumulation)))

    def micro_batches_after(self, step: int) -> int:
        """Micro-batches that are left on one device after `step` optimizer steps."""
        return max(0, self.micro_batches - step * self.accumulation)

    def epoch_after(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps."""
        return min(step * self.accumulation, self.micro_batches) * self.devices / self.batches_per_epoch

    @property
    def epochs(self) -> int:
        """Passes over the data, the last one perhaps a part of one."""
        return math.ceil(self.epoch_after(self.steps))

    def last_steps(self, after: int) -> list[int]:
        """The optimizer step that ends each epoch, of those after step `after`; the last is the end of the run."""
        per_step = self.devices * self.accumulation
        ends = {math.ceil(epoch * self.batches_per_epoch / per_step) for epoch in range(1, self.epochs)}
        return sorted(step for step in {*ends, self.steps} if after < step <= self.steps)


def adapt_arguments(
    args: TrainingArguments, *, batches_per_epoch: int, use_cache: bool
) -> tuple[TrainingArguments, RunLength]:
    """A copy of `args` in which "epoch" strategies are steps of an epoch's length.

    Settings that our batches require are overridden: no column is removed, no batch is skipped on resuming (the stream
    seeks its cursor), one process uses one device, and the student's configuration keeps its own `use_cache`. A loss
    that is not finite ends the run, so none is left out of the log: looking for one would wait for the device at each
    micro-batch.
    """
    args = copy.copy(args)
    length = RunLength.of(args, batches_per_epoch=batches_per_epoch)
    args.max_steps = length.steps
    every = length.steps_per_epoch
    if args.eval_strategy == IntervalStrategy.EPOCH:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, every
        args.eval_delay = math.ceil(args.eval_delay * every)
    if args.logging_strategy == IntervalStrategy.EPOCH:
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, every
    if args.save_strategy == SaveStrategy.EPOCH:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, every
    args.remove_unused_columns = False
    args.ignore_data_skip = True
    args.use_cache = use_cache
    args.logging_nan_inf_filter = False
    args._n_gpu = min(1, args.n_gpu)
    return args, length


UNSUPPORTED_PARAMETERS = {
    "data_collator": "the dataset's stream collates rows with their targets; pass pack_length to pack them",
    "model_init": "pass a model, or a folder or hub name, as the first argument",
    "compute_loss_func": "pass loss=, which may be an object of your own class (docs/adding_a_loss.md)",
    "compute_metrics": "evaluate() measures the figures of `coldstill evaluate`; measure others in a callback's "
    "on_evaluate",
    "preprocess_logits_for_metrics": "evaluate() measures the figures of `coldstill evaluate` in parts, and keeps no "
    "logits",
    "tokenizer": "pass it as processing_class",
}
"""Parameters of transformers' Trainer that `DistillTrainer` lacks, with what to do instead."""

_ROWS_OF_STREAM = "the dataset's stream decides which rows are in a batch; data_seed sets their order"
_ALL_METRICS = "evaluate() measures the figures of `coldstill evaluate`, and keeps no predictions"

UNSUPPORTED_FIELDS = {
    "auto_find_batch_size": "it changes the batch size during a run",
    "average_tokens_across_devices": "the loss is always divided by the targets of all devices",
    "batch_eval_metrics": _ALL_METRICS,
    "bf16_full_eval": "evaluation uses the precision of training; set bf16, or load the model in bfloat16",
    "dataloader_drop_last": "no batch is dropped, and the last step divides by its own targets",
    "dataloader_in_order": "a checkpoint stores the place in the order of the batches",
    "deepspeed": "FSDP2 shards a student that is too large for one device (docs/several_gpus.md)",
    "enable_jit_checkpoint": "it writes a checkpoint within an optimizer step; `coldstill train` saves one after the "
    "step at SIGTERM",
    "fp16_full_eval": "evaluation uses the precision of training; set fp16, or load the model in float16",
    "group_by_length": _ROWS_OF_STREAM,
    "include_for_metrics": _ALL_METRICS,
    "label_smoothing_factor": "the targets are the teacher's distributions",
    "parallelism_config": "FSDP2 shards a student that is too large for one device (docs/several_gpus.md)",
    "prediction_loss_only": _ALL_METRICS,
    "restore_callback_states_from_checkpoint": "it would rebuild callbacks without their arguments",
    "train_sampling_strategy": _ROWS_OF_STREAM,
    "use_liger_kernel": "it replaces the forward pass in which the loss is computed; fused_head=True saves the memory",
}
"""Fields of `TrainingArguments` that must keep their defaults, with the reason."""

_UNSUPPORTED_OPTIMIZERS = ("lomo", "adalomo", "layerwise")
"""They change weights within the backward pass, before the loss of the step is checked."""
_ACCELERATOR_FIELDS = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")


def validate_arguments(args: TrainingArguments) -> None:
    """Raise `UnsupportedArgument` for each setting that would have no effect, or lose targets or state.

    A warmup without effect is only a warning: runs of earlier releases that have it must resume.
    """
    if args.lr_scheduler_type == SchedulerType.CONSTANT and args.warmup_steps:
        logger.warning(
            f"a warmup of {args.warmup_steps:g} has no effect: lr_scheduler constant has the peak learning rate from "
            "the first step on. Set it to constant_with_warmup, or the warmup to 0"
        )
    defaults = {field.name: _default(field) for field in fields(args)}
    for name, reason in UNSUPPORTED_FIELDS.items():
        value = getattr(args, name, None)
        # Some releases turn None into an empty list or mapping.
        if value != defaults.get(name) and (value or defaults.get(name)):
            raise _unsupported(f"TrainingArguments: {name}", value, defaults.get(name), reason)
    for part in _UNSUPPORTED_OPTIMIZERS:
        if part in str(args.optim.value):
            reason = "it changes weights within the backward pass, before the loss of the step is checked"
            raise _unsupported("TrainingArguments: optim", args.optim.value, "an optimizer with a step", reason)
    config, plain = args.accelerator_config, AcceleratorConfig()
    for name in _ACCELERATOR_FIELDS:
        value, default = getattr(config, name), getattr(plain, name)
        if value != default:
            raise _unsupported(f"TrainingArguments: accelerator_config.{name}", value, default, _ROWS_OF_STREAM)
    steps = (config.gradient_accumulation_kwargs or {}).get("num_steps", 1)
    if steps != 1:
        what = "TrainingArguments: accelerator_config.gradient_accumulation_kwargs.num_steps"
        raise _unsupported(what, steps, 1, "the length of the run follows from gradient_accumulation_steps; set that")


def validate_optimizer(name: str) -> None:
    """Raise `UnsupportedArgument` for an optimizer that transformers does not know."""
    known = [one.value for one in OptimizerNames]
    if name not in known:
        raise UnsupportedArgument(
            "training.optimizer",
            found=name,
            wanted="an optimizer of transformers",
            fix=f"use {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]}",
        )


def validate_parameters(given: Mapping[str, Any]) -> None:
    """Raise `UnsupportedArgument` for a parameter of transformers' Trainer that we lack, `TypeError` for others."""
    for name, value in given.items():
        if name not in UNSUPPORTED_PARAMETERS:
            raise TypeError(f"DistillTrainer() got an unexpected keyword argument {name!r}")
        if value is not None:
            what = f"DistillTrainer: {name}"
            raise UnsupportedArgument(
                what, found=f"a {type(value).__name__}", wanted="None", fix=UNSUPPORTED_PARAMETERS[name]
            )


def rank_by_metric(args: TrainingArguments, datasets: Any, *, only: Collection[str] | None = None) -> TrainingArguments:
    """A copy of `args` whose `greater_is_better` is the better direction of `metric_for_best_model`.

    `datasets`: what is evaluated, one dataset or several by name. The direction of a scheduler that follows the metric,
    such as reduce_lr_on_plateau, is set too. `only`: names of the metrics that may be chosen, None for all.

    Raises `UnknownMetric` for a name that no evaluation of the run reports, and `UnsupportedArgument` for a run without
    evaluation or a scheduler of the other direction.
    """
    args, name = copy.copy(args), args.metric_for_best_model
    if name is None:
        return args
    if datasets is None or args.eval_strategy == IntervalStrategy.NO:
        reason = "the run evaluates nothing; set eval_strategy and pass eval_dataset"
        raise _unsupported("TrainingArguments: metric_for_best_model", name, None, reason)
    parts = datasets if isinstance(datasets, Mapping) else {"": datasets}
    known: dict[str, Better | None] = {
        f"eval_{part}_{metric}" if part else f"eval_{metric}": better
        for part, dataset in parts.items()
        for metric, better in measured_metrics(dataset).items()
        if only is None or metric in only
    }
    full = name if name.startswith("eval_") else f"eval_{name}"
    if full not in known:
        ranking = [metric for metric, better in known.items() if better]
        nearest = difflib.get_close_matches(full, ranking, n=1, cutoff=0)[0]
        raise UnknownMetric(
            "metric that selects the best checkpoint",
            found=name,
            wanted=f"one that this run measures: {', '.join(ranking)}",
            fix=f"set training.best_metric (or metric_for_best_model) to {nearest}",
        )
    if known[full] is None:
        end = "highest" if args.greater_is_better else "lowest"
        logger.warning(f"neither high nor low values of {full} are better; the checkpoint with the {end} one is kept")
        return args
    highest = known[full] == "higher"
    if args.greater_is_better != highest:
        logger.warning(
            f"greater_is_better is set to {highest} for {full}: its {known[full]} values are better. It was "
            f"{args.greater_is_better}, which is also the value that transformers derives from this name"
        )
        args.greater_is_better = highest
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        options, mode = dict(args.lr_scheduler_kwargs or {}), "max" if highest else "min"
        if options.setdefault("mode", mode) != mode:
            reason = f"the {known[full]} values of {full}, which it follows, are better"
            raise _unsupported("TrainingArguments: lr_scheduler_kwargs: mode", options["mode"], mode, reason)
        args.lr_scheduler_kwargs = options
    return args


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _unsupported(what: str, found: object, wanted: object, reason: str) -> UnsupportedArgument:
    return UnsupportedArgument(what, found=found, wanted=f"{wanted}, because {reason}", fix="remove this setting")
