"""`coldstill train CONFIG.yaml`, slowed down, that prints each micro-batch: a process for tests to send signals to."""

from __future__ import annotations

import functools
import sys
import time

from transformers import TrainerCallback

from coldstill import api
from coldstill.cli.main import main


class Slow(TrainerCallback):
    """Prints and sleeps after each micro-batch."""

    def on_substep_end(self, args, state, control, **_) -> None:
        print(f"micro-batch after step {state.global_step}", flush=True)
        time.sleep(0.3)

    def on_step_end(self, args, state, control, **_) -> None:
        print(f"step {state.global_step}", flush=True)
        time.sleep(0.3)


if __name__ == "__main__":
    api.train = functools.partial(api.train, callbacks=[Slow()])
    sys.argv = ["coldstill", "train", *sys.argv[1:]]
    main()
