"""Signals during training: Ctrl-C, SIGTERM and SIGHUP save a checkpoint and end the run.

A signal that ends a loader's process becomes a named error.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

from coldstill.common.interrupts import Interrupted, handling_signals
from coldstill.trainer.errors import LoaderWorkerDied

_LOADER_SECONDS = 120
"""How long a loader's process works on after a SIGTERM: longer than any step that is worth a checkpoint."""

_WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited)")
_SIGNALS = {"Killed": "SIGKILL", "Bus error": "SIGBUS"}
_REMEDIES = {
    "Killed": "most often the machine ran out of memory: lower training.dataloader_workers (dataloader_num_workers of "
    "TrainingArguments), of which 0 needs the least, or give the job more memory",
    "Bus error": "most often /dev/shm is full: give the container more shared memory (docker run --shm-size=8g), or "
    "set training.dataloader_workers (dataloader_num_workers of TrainingArguments) to 0",
}


def outlive_sigterm(_: int) -> None:
    """Let a loader's process survive a SIGTERM for a while; for `DataLoader`'s `worker_init_fn`.

    Slurm and `timeout` signal all processes, and the running step needs its batches. torch ends its workers at
    SIGTERM, and then the training with an error. The process still ends by itself when its loader does.
    """
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LOADER_SECONDS))


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Raises the death of a loader's process as `LoaderWorkerDied`.

    torch raises it in the main thread wherever that is, also in the middle of a step, as a plain `RuntimeError`.
    """
    try:
        yield
    except RuntimeError as error:
        if (found := _WORKER_DIED.search(str(error))) is None:
            raise
        raise worker_died(*found.groups()) from None


def worker_died(pids: str, signal_name: str | None = None) -> LoaderWorkerDied:
    """The error for a loader's process, by its id and torch's name of the signal that ended it."""
    return LoaderWorkerDied(
        f"the data loader's process {pids}",
        found=f"ended by {_SIGNALS.get(signal_name, signal_name)}" if signal_name else "gone, as after a SIGKILL",
        wanted="a process that runs as long as the training",
        fix=f"{_REMEDIES.get(signal_name or 'Killed', _REMEDIES['Killed'])}. "
        "Re-run the same command to resume from the newest checkpoint",
    )


class CheckpointOnSignal(TrainerCallback):
    """Saves a checkpoint at the first signal and raises `Interrupted`; a second signal raises it at once.

    The checkpoint is written at the end of the running micro-batch or optimizer step. A micro-batch whose optimizer
    step is not complete is discarded, and the random numbers are those of the step's begin, so the resumed run equals
    an unbroken one. If no micro-batch ends within `grace_s` seconds, the run ends without a new checkpoint.

    Used as a context manager around the training. All devices stop after the same step, because one signal is enough.
    A scheduler signals each of them, at slightly different times, so only a signal that this process has received
    before counts as the first of two.
    """

    def __init__(self, *, grace_s: float, saved_step: int = 0):
        """`saved_step`: of the checkpoint that the run resumes from."""
        self._grace_s = grace_s
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._signum: int | None = None
        """The signal that ends the run, of this process or of another device's."""
        self._has_received = False
        self._is_agreed = False
        self._is_training = False
        self._timer: threading.Timer | None = None
        self._saved_step = saved_step
        self._random: dict[str, Any] = {}

    def __enter__(self) -> CheckpointOnSignal:
        self._handling = handling_signals(self._on_signal)
        self._handling.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._is_training = False
        if self._timer is not None:
            self._timer.cancel()
        self._handling.__exit__(None, None, None)

    def _on_signal(self, signum: int, _: object) -> None:
        if os.getpid() != self._process:
            return  # a loader's process: a terminal and Slurm signal it too, and the step needs its batches
        if self._has_received or not self._is_training:
            raise self._interrupted(signum)
        self._has_received = True
        if self._signum is not None:
            return  # another device had one, and the checkpoint is being written
        self._signum = signum
        self._timer = threading.Timer(self._grace_s, self._send_again, [signum])
        self._timer.daemon = True
        self._timer.start()

    def _send_again(self, signum: int) -> None:
        signal.pthread_kill(self._thread, signum)

    def _interrupted(self, signum: int) -> Interrupted:
        step = self._saved_step
        kept = f"The checkpoint of step {step:,} is kept" if step else "No optimizer step was saved yet"
        return Interrupted(signum, f"{kept}; re-run the same command to resume.")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the end of a step from here on."""
        self._saved_step, self._is_training = state.global_step, True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the random numbers of the step's begin, for a checkpoint in the middle of its micro-batches."""
        if args.gradient_accumulation_steps > 1:
            self._random = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                self._random["cuda"] = torch.cuda.get_rng_state()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop in the middle of an optimizer step; of several devices, only at its end."""
        if self._signum is not None and args.world_size == 1:
            random.setstate(self._random["python"])
            np.random.set_state(self._random["numpy"])
            torch.set_rng_state(self._random["cpu"])
            if "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"])
            self._stop(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after an optimizer step. A measurement that is due comes first: the resumed run would not repeat it."""
        if args.world_size > 1:
            received = torch.tensor(self._signum or 0, device=args.device)
            self._signum = int(reduce(received, "sum").item()) and (self._signum or signal.SIGTERM)
            self._signum = self._signum or None
            self._is_agreed = self._signum is not None
        if self._signum is not None:
            self._stop(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after a measurement; of several devices, only if all do."""
        if self._signum is not None and (args.world_size == 1 or self._is_agreed):
            self._stop(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the run once its checkpoint is complete."""
        self._saved_step = state.global_step
        if self._signum is not None:
            raise self._interrupted(self._signum)

    def _stop(self, state: Any, control: Any) -> None:
        if self._timer is not None and not control.should_evaluate:
            self._timer.cancel()  # writing takes what it takes: an incomplete checkpoint is skipped
        if state.global_step == self._saved_step:
            assert self._signum is not None
            raise self._interrupted(self._signum)
        control.should_save = control.should_training_stop = True
