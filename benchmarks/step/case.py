"""The child process of one side of `benchmarks.step`; its last line of standard output has the figures."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.common.command import new_parser
from benchmarks.common.memory import Peak
from benchmarks.step import SIDES
from benchmarks.step.sides import trainer_of

WARM_UP = 2
"""Steps that are not counted, because the first ones create the optimizer's state."""


class Clock(TrainerCallback):
    """Records the time at the end of each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time after the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then print the median time of a step and the peak memory."""
    parser = new_parser("step.case", __doc__, takes="a minute", result=None)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    peak, clock = Peak(), Clock()
    trainer_of(options.side, options.folder, steps=WARM_UP + options.steps, callbacks=[clock]).train()
    seconds = [b - a for a, b in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)]
    print(json.dumps({"step_s": statistics.median(seconds), "peak_bytes": peak.bytes()}))


if __name__ == "__main__":
    main()
