"""Between optimizer steps: the micro-batches' sums come in, t moves, and a state for the checkpoint goes out.

The state travels in `trainer_state.json` of every checkpoint, the last file that transformers writes there.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .losses import LossValues, TaidSchedule

STATE_NAME = "StepRecord"
"""Key of our state in `trainer_state.json`: transformers uses the class's name."""


class StepRecord(TrainerCallback, ExportableState):
    """Adds up one optimizer step over its micro-batches, closes it, and counts targets and seconds of the whole run."""

    def __init__(self, schedule: TaidSchedule | None, *, reduce: Callable[[torch.Tensor], torch.Tensor]):
        """`reduce` adds a tensor up over all devices."""
        self.schedule, self._reduce = schedule, reduce
        self._reset()

    def _reset(self) -> None:
        self.targets, self._seconds_before, self._began = 0, 0.0, time.monotonic()
        self._peak_before = 0.0
        self._step_sums: torch.Tensor | None = None
        self._step_targets = 0
        self._kl_since_log: list[float] = []

    def add(self, values: LossValues, *, targets_of_step: int) -> None:
        """Take a micro-batch; `targets_of_step` counts the targets of all micro-batches and devices of the step."""
        sums = torch.stack([values.distillation.sum(), values.bucket_kl.sum()]).detach().double()
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums
        self._step_targets = targets_of_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start afresh, or go on from the checkpoint's state."""
        self._reset()
        if self.schedule is not None:
            self.schedule.reset()
        if state.global_step == 0:
            return
        saved = state.stateful_callbacks[STATE_NAME]["attributes"]
        self.targets, self._seconds_before = saved["targets"], saved["seconds"]
        self._peak_before = saved["peak_memory_mb"]
        if self.schedule is not None:
            self.schedule.load_state_dict(saved["schedule"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the optimizer step: t moves here and nowhere else."""
        assert self._step_sums is not None
        distillation, bucket_kl = (self._reduce(self._step_sums) / self._step_targets).tolist()
        self.targets += self._step_targets
        self._kl_since_log.append(bucket_kl)
        self._step_sums = None
        if self.schedule is not None:
            self.schedule.update(distillation, step=state.global_step, total_steps=state.max_steps)

    def take_logs(self) -> dict[str, float]:
        """Entries for the training log: `bucket_kl` is the mean of the steps since the last call."""
        logs = {}
        if self._kl_since_log:
            logs["bucket_kl"] = sum(self._kl_since_log) / len(self._kl_since_log)
            self._kl_since_log = []
        if self.schedule is not None:
            logs |= {"taid_t": self.schedule.t, "taid_momentum": self.schedule.momentum}
        return logs

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps, fit for JSON."""
        attributes = {
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "targets": self.targets,
            "seconds": self._seconds_before + time.monotonic() - self._began,
            "peak_memory_mb": max(self._peak_before, _peak_memory_mb()),
        }
        return {"args": {}, "attributes": attributes}


def _peak_memory_mb() -> float:
    """Most memory of this process so far, in MiB: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
