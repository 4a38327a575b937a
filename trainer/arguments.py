"""Adapts transformers' `TrainingArguments` to an endless stream of batches, and counts the steps of a run."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


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


def adapt_arguments(
    args: TrainingArguments, *, batches_per_epoch: int, use_cache: bool
) -> tuple[TrainingArguments, RunLength]:
    """A copy of `args` in which "epoch" strategies are steps of an epoch's length.

    Settings that our batches require are overridden: no column is removed, no batch is skipped on resuming (the stream
    seeks its cursor), one process uses one device, and the student's configuration keeps its own `use_cache`.
    """
    args = copy.copy(args)
    length = RunLength.of(args, batches_per_epoch=batches_per_epoch)
    args.max_steps = length.steps
    every = length.steps_per_epoch
    if args.eval_strategy == IntervalStrategy.EPOCH:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, every
    if args.logging_strategy == IntervalStrategy.EPOCH:
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, every
    if args.save_strategy == SaveStrategy.EPOCH:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, every
    args.remove_unused_columns = False
    args.ignore_data_skip = True
    args.use_cache = use_cache
    args._n_gpu = min(1, args.n_gpu)
    return args, length


def validate_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for settings that would lose targets or state.

    These change the batch size during a run, restore our callbacks without their arguments, or leave no device with all
    weights.
    """
    wrong = [
        name for name in ("auto_find_batch_size", "restore_callback_states_from_checkpoint") if getattr(args, name)
    ]
    if wrong:
        raise ValueError(f"set {' and '.join(f'{name}=False' for name in wrong)}")
    if args.fsdp or args.deepspeed:
        raise ValueError("fsdp and deepspeed are not supported: the student must fit one device; use torchrun for DDP")
