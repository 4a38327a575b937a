"""The child process of one case of `benchmarks.loss`.

A line of JSON on standard input requests a measurement; a line on standard output is the result. Inputs are created for
each measurement and freed after it, so only one process at a time holds any.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.common.command import new_parser
from benchmarks.common.memory import Peak
from benchmarks.loss.sides import SIDES, Inputs, Side, make_inputs

WARM_UP = {"positions": 64, "width": 32, "vocabulary": 500, "draws": 4, "seed": 0}


def measure(side: Side, inputs: Inputs) -> dict[str, float]:
    """Seconds of a loss and its gradients, peak bytes above the level before, and figures that identify the result.

    With one thread, seconds are CPU time, because a shared machine may pause the process; otherwise wall time.
    """
    clock = time.process_time if one_thread() else time.perf_counter
    peak = Peak()
    started, wall = clock(), time.perf_counter()
    total = side(inputs)
    total.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, wall, peak_bytes = clock() - started, time.perf_counter() - wall, peak.bytes()
    by_hidden, by_weight = inputs.hidden.grad, inputs.weight.grad
    assert by_hidden is not None
    assert by_weight is not None
    return {
        "seconds": seconds,
        "wall_seconds": wall,
        "peak_bytes": peak_bytes,
        "loss": float(total.detach()),
        "by_hidden": float(by_hidden.float().norm()),
        "by_weight": float(by_weight.float().norm()),
    }


def one_thread() -> bool:
    """Whether one CPU thread computes everything."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on request until standard input ends."""
    parser = new_parser("loss.case", __doc__, takes="as long as standard input lasts", result=None)
    parser.add_argument("side", choices=SIDES)
    name = parser.parse_args(arguments).side
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def answer(**options: int) -> dict[str, float]:
        return measure(SIDES[name], make_inputs(**options, dense=name == "dense TAID", device=device))

    answer(**WARM_UP)
    print(
        json.dumps({"threads": torch.get_num_threads(), "clock": "processor" if one_thread() else "wall"}), flush=True
    )
    for line in sys.stdin:
        gc.collect()
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
