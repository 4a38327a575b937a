"""How long a run is: transformers' arguments and the length of an epoch come in, steps and adapted arguments go out.

Only what `DistillTrainer` needs of `TrainingArguments` is known here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """`batches_per_epoch` of all `devices` together; `micro_batches` of one device, and optimizer `steps`, of the run.

    An optimizer step of `accumulation` micro-batches may take them from two epochs; only the last step of the run may
    have fewer than the others.
    """

    batches_per_epoch: int
    devices: int
    accumulation: int
    micro_batches: int
    steps: int

    @classmethod
    def of(cls, args: TrainingArguments, *, batches_per_epoch: int) -> RunLength:
        """By `max_steps` where it is given, else by `num_train_epochs`."""
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
        """Rounded, at least one."""
        return max(1, round(self.batches_per_epoch / (self.devices * self.accumulation)))

    def epoch_after(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps."""
        return min(step * self.accumulation, self.micro_batches) * self.devices / self.batches_per_epoch


def adapted(args: TrainingArguments, *, batches_per_epoch: int, use_cache: bool) -> tuple[TrainingArguments, RunLength]:
    """A copy of `args` for a stream without an end: "epoch" strategies become steps of an epoch's length.

    What our batches need is set, whatever it was: no column is removed, nothing is skipped on resuming (the stream goes
    to its cursor), one process has one device, and the student's own `use_cache` stays in its configuration.
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


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for what would lose targets or state: another batch size in the middle of a run, our state
    made anew without its arguments, weights that no device has as a whole."""
    wrong = [
        name for name in ("auto_find_batch_size", "restore_callback_states_from_checkpoint") if getattr(args, name)
    ]
    if wrong:
        raise ValueError(f"set {' and '.join(f'{name}=False' for name in wrong)}")
    if args.fsdp or args.deepspeed:
        raise ValueError("the student must fit one device: leave fsdp and deepspeed out, and start DDP with torchrun")
