"""The state between optimizer steps: sums of micro-batches, t, and the data's cursor.

The state is part of `trainer_state.json` in every checkpoint, the last file that transformers writes there.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object, reduce
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .arguments import RunLength
from .errors import CheckpointMismatch, NonFiniteGradient, NonFiniteLoss, NonFiniteWeights, VanishedGradient
from .loss_kernels.fused_head import LossValues
from .losses.base import LossState
from .losses.taid_schedule import TaidSchedule
from .sharding import is_sharded, local_part

MEASURED = ("targets_per_s", "peak_memory_mb")
"""Entries of the log that depend on the machine, and differ between equal runs."""
MOST_NAMED = 20
"""Rows that one error message lists."""
VANISHED_NORM, LEARNABLE_LOSS, VANISHED_STEPS = 1e-6, 0.1, 20
"""A gradient below this norm, with a mean loss above this many nats, in this many steps in a row: nothing is learned.
Norms of students that learn are between 0.01 and 100; a reverse KL that had lost its student measured 6e-11."""


class StepRecord(TrainerCallback, ExportableState):
    """Adds up one optimizer step over its micro-batches and devices, closes it, and keeps the cursor of the data."""

    def __init__(
        self,
        schedule: TaidSchedule | None,
        loss_state: LossState | None,
        *,
        order: Mapping[str, Any],
        length: RunLength,
    ):
        """`loss_state`: what the loss keeps between steps, if anything. `order`: what determines the order of the rows;
        a checkpoint of another order is rejected."""
        self.schedule, self.loss_state, self.order, self._length = schedule, loss_state, dict(order), length
        self._reset()

    def _reset(self) -> None:
        self.targets, self._seconds_before, self._began = 0, 0.0, time.monotonic()
        self._peak_before = 0.0
        self.cursor: dict[str, Any] | None = None
        self._kl_since_log: list[float] = []
        self._targets_at_log, self._logged = 0, self._began
        self._vanished_steps = 0
        self.open_step(targets=0, cursor=None)

    def open_step(self, *, targets: int, cursor: dict[str, Any] | None) -> None:
        """Begin an optimizer step of `targets` target positions on all devices; `cursor`: of the data after it."""
        self._step_targets, self._step_cursor = targets, cursor
        self._parts: list[tuple[LossValues, Mapping[str, Any]]] = []
        self._means: tuple[float, float] | None = None
        self._state_sums: list[float] = []
        self.gradient_norm: torch.Tensor | float = 1.0
        """Of the step's complete gradient. A scaler's is left out: it skips a step that is not finite."""

    def add(self, values: LossValues, batch: Mapping[str, Any]) -> None:
        """Keep the values of a micro-batch; they are read from the device once per optimizer step.

        Of the batch only what names its rows: its pixels would stay on the device until the end of the step.
        """
        self._parts.append((values, {name: batch[name] for name in ("sample_ids", "target_samples")}))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module | None = None, **_: Any
    ) -> None:
        """Start with an empty state, or restore the checkpoint's. Raises `NonFiniteWeights`, and `CheckpointMismatch`
        for a checkpoint of a loss that keeps other numbers between steps."""
        self._reset()
        require_finite_weights(model)
        # transformers sees one pass of the length of the run.
        state.num_train_epochs = self._length.epochs
        for kept in (self.schedule, self.loss_state):
            if kept is not None:
                kept.reset()
        if state.global_step == 0:
            return
        # transformers stores the state of a callback under its class name.
        saved = state.stateful_callbacks[StepRecord.__name__]["attributes"]
        now = self.state()["attributes"]
        for name in ("schedule", "memory"):
            of_run, own = saved[name], now[name]
            if (of_run is None) != (own is None):
                raise CheckpointMismatch(
                    f"loss of the run of the checkpoint at step {state.global_step}",
                    found=f"one that keeps {', '.join(of_run or ['nothing'])} between steps",
                    wanted=f"the loss of this run, which keeps {', '.join(own or ['nothing'])}",
                    fix="resume with the loss of that run, or start a new run in another output folder",
                )
        self.targets, self._seconds_before, self.cursor = saved["targets"], saved["seconds"], saved["cursor"]
        self._peak_before = saved["peak_memory_mb"]
        self._targets_at_log = self.targets
        if self.schedule is not None:
            self.schedule.load_state_dict(saved["schedule"])
        if self.loss_state is not None:
            self.loss_state.load_state_dict(saved["memory"])

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Raise `NonFiniteLoss` or `NonFiniteGradient` on all devices if one has a value that is not finite;
        `NonFiniteWeights` if the reason is in the student; `VanishedGradient` if it has not learned for long. No
        weight has changed, and a step without targets on any device changes none."""
        sums = torch.stack([_sums(values) for values, _ in self._parts]).sum(0)
        norm = torch.as_tensor(self.gradient_norm, device=sums.device)
        of_norm = torch.stack([~norm.isfinite(), norm < VANISHED_NORM])
        sums = torch.cat([sums, of_norm.to(sums.dtype)])
        if self.loss_state is not None:
            sums = torch.cat([sums, self.loss_state.take().to(sums.device)])
        distillation, bucket_kl, broken, broken_gradients, vanished, *state_sums = reduce(sums, "sum").tolist()
        if broken or broken_gradients:
            require_finite_weights(model)
            raise self._not_finite(int(broken), step=state.global_step + 1)
        # A step of rows that were all skipped has no target.
        targets = max(1, self._step_targets)
        if not self._step_targets and optimizer is not None:
            _drop_gradients(optimizer, are_unscaled=args.max_grad_norm > 0)
        self._means = (distillation / targets, bucket_kl / targets)
        if self._step_targets:
            is_stuck = vanished and distillation / targets > LEARNABLE_LOSS
            self._vanished_steps = self._vanished_steps + 1 if is_stuck else 0
        if self._vanished_steps >= VANISHED_STEPS:
            raise VanishedGradient(
                f"gradient at optimizer steps {state.global_step + 2 - VANISHED_STEPS} to {state.global_step + 1}",
                found=f"a norm of {float(norm):.0e} with a loss of {distillation / targets:.2f} nats per target: the "
                "student learns nothing",
                wanted=f"a norm above {VANISHED_NORM:g}, or a loss below {LEARNABLE_LOSS:g}",
                fix="lower training.learning_rate, set loss to taid or forward_kl, or loss.tail of reverse_kl to "
                "forward_kl; a reverse KL has no gradient once the student's mass has left the ids that the "
                "dataset keeps",
            )
        self._state_sums = state_sums

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the optimizer step: t moves here and nowhere else."""
        assert self._means is not None
        distillation, bucket_kl = self._means
        self.targets += self._step_targets
        self.cursor = self._step_cursor
        # A mean of nothing is no loss of 0, which the log would show and t follow.
        has_loss = self._step_targets > 0
        if has_loss:
            self._kl_since_log.append(bucket_kl)
        if self.schedule is not None:
            self.schedule.update(
                distillation if has_loss else None, step=state.global_step, total_steps=state.max_steps
            )
        if self.loss_state is not None:
            self.loss_state.update(self._state_sums, step=state.global_step, total_steps=state.max_steps)
        state.epoch = self._length.epoch_after(state.global_step)
        self.open_step(targets=0, cursor=None)

    def take_logs(self) -> dict[str, float]:
        """Entries for the training log: `bucket_kl` and `targets_per_s` are means of the steps since the last call."""
        now = time.monotonic()
        logs = {
            "targets_per_s": round((self.targets - self._targets_at_log) / max(now - self._logged, 1e-6), 1),
            "peak_memory_mb": round(max(self._peak_before, _peak_memory_mb()), 1),
        }
        self._targets_at_log, self._logged = self.targets, now
        if self._kl_since_log:
            logs["bucket_kl"] = sum(self._kl_since_log) / len(self._kl_since_log)
            self._kl_since_log = []
        if self.schedule is not None:
            logs |= {"taid_t": self.schedule.t, "taid_momentum": self.schedule.momentum}
        if self.loss_state is not None:
            logs |= self.loss_state.logs()
        return logs

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps, as JSON types."""
        attributes = {
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "memory": None if self.loss_state is None else self.loss_state.state_dict(),
            "targets": self.targets,
            "cursor": self.cursor,
            "order": self.order,
            "seconds": self._seconds_before + time.monotonic() - self._began,
            "peak_memory_mb": max(self._peak_before, _peak_memory_mb()),
        }
        return {"args": {}, "attributes": attributes}

    def _not_finite(self, count: int, *, step: int) -> NonFiniteLoss | NonFiniteGradient:
        if not count:
            names = sorted({name for _, batch in self._parts for name in batch["sample_ids"]})
            return NonFiniteGradient(
                f"gradient at optimizer step {step}, of rows {', '.join(names[:MOST_NAMED])}",
                found=f"a norm of {float(self.gradient_norm)}, though the loss is finite",
                wanted="a finite gradient; the optimizer was stopped before this step",
                fix="lower training.learning_rate, or set student.dtype or student.weights to float32",
            )
        here = sorted({name for values, batch in self._parts for name in _broken_rows(values, batch)})
        rows = gather_object(here)
        more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        return NonFiniteLoss(
            f"loss of rows {', '.join(rows[:MOST_NAMED])}{more} at optimizer step {step}",
            found=f"{count} of {self._step_targets} values that are not finite",
            wanted="a finite loss; the optimizer was stopped before this step",
            fix="lower training.learning_rate; if the first step fails, inspect these rows of the dataset",
        )


def figures_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a training took, over all its starts, from the attributes of `StepRecord.state` at its end."""
    return {
        "targets": record["targets"],
        "targets_per_s": round(record["targets"] / record["seconds"], 1),
        "wall_s": round(record["seconds"], 3),
        "peak_memory_mb": round(record["peak_memory_mb"], 1),
        "taid_t": None if record["schedule"] is None else record["schedule"]["t"],
    }


def _sums(values: LossValues) -> torch.Tensor:
    """Sums of distillation and bucket KL, and the number of values that are not finite."""
    broken = ~values.loss.isfinite()
    return torch.stack([values.distillation.double().sum(), values.bucket_kl.double().sum(), broken.double().sum()])


def _drop_gradients(optimizer: Any, *, are_unscaled: bool) -> None:
    """Let the optimizer of accelerate pass over all weights: a gradient of 0 would leave momentum and weight decay."""
    if optimizer.scaler is not None and not are_unscaled:
        optimizer.scaler.unscale_(optimizer.optimizer)  # which must have seen a gradient before it steps
    optimizer.zero_grad()


_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""torch has no `isfinite` for all types of 8 bits, which only frozen weights have."""


def require_finite_weights(model: torch.nn.Module | None) -> None:
    """Raise `NonFiniteWeights` for the first weight of `model` with a value that is not finite; if it is sharded, on
    all devices alike. Call it on all of them."""
    weights = {} if model is None else {n: w.detach() for n, w in model.named_parameters() if w.dtype in _CHECKED}
    if not weights:
        return
    broken = torch.stack([(~local_part(weight).isfinite()).sum() for weight in weights.values()])
    if is_sharded(model):
        broken = reduce(broken, "sum")
    if not broken.any():
        return
    place = int(broken.nonzero()[0])
    name, weight = list(weights.items())[place]
    raise NonFiniteWeights(
        f"weight {name} of the student",
        found=f"{int(broken[place]):,} of {weight.numel():,} values that are not finite",
        wanted="finite weights; no checkpoint of them is written",
        fix="choose another student, or lower training.learning_rate if it had finite weights at the start; if a "
        "checkpoint holds such weights, delete it to resume from the one before",
    )


def _broken_rows(values: LossValues, batch: Mapping[str, Any]) -> list[str]:
    owners = batch["target_samples"]
    return [batch["sample_ids"][owner] for owner in owners[(~values.loss.isfinite()).to(owners.device)].tolist()]


def _peak_memory_mb() -> float:
    """Peak memory of this process so far, in MiB: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
