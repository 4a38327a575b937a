"""When a training ends, by the pace of its steps; and the progress bar that says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from coldstill.common.clock import ends_about, local_now
from coldstill.common.progress import tqdm


class Pace:
    """Time left of a run. Steps of earlier starts, and the first of this one, which warms up, do not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """`clock`: seconds since any moment."""
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def left_s(self, step: int, total: int) -> float | None:
        """Seconds until step `total`, at the end of `step`; None before the second step. Call it after each step."""
        now = self._clock()
        if self._first is None or step <= self._first[0]:  # the first step, or that of a second training
            self._first = (step, now)
        first, began = self._first
        return (total - step) * (now - began) / (step - first) if step > first else None


class EndTimeBar(ProgressCallback):
    """The bar of transformers with the time of the clock at which the run ends; in a resumed run, its speed counts the
    steps of this start alone."""

    def __init__(self, pace: Pace, now: Callable[[], datetime] = local_now):
        super().__init__()
        self._pace, self._now = pace, now

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the step of the checkpoint."""
        self.current_step = state.global_step
        if state.is_world_process_zero:  # our own bar, which is a few lines in a log
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            left = self._pace.left_s(state.global_step, state.max_steps)
            if left is not None:
                self.training_bar.set_postfix_str(f"ends {ends_about(left, now=self._now())}", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, without a time at which it ends."""
        if self.training_bar is not None:
            self.training_bar.set_postfix_str("", refresh=False)
        super().on_train_end(args, state, control, **kwargs)


def with_end_time(trainer: Trainer) -> None:
    """Replace transformers' bar by ours, which is a few lines where standard error is a log."""
    # Not by its type: that would also take a bar of the caller, of a class derived from it.
    for bar in [each for each in trainer.callback_handler.callbacks if type(each) is ProgressCallback]:
        trainer.remove_callback(bar)
        trainer.add_callback(EndTimeBar(Pace()))
