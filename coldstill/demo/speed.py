"""Measures how fast this machine trains, to say at the start how long the demo will take.

`python -m coldstill.demo.speed` prints a `Speed` as JSON. It runs in its own process with the environment of the
stages, because the demo's driver imports no torch. The seconds of the demo are then

    PROCESSES * start_s + STEPS / steps_per_s

Both constants are fitted to two runs on 2 cores: the whole demo of `benchmarks/results/demo_2_cores.json`, on an idle
machine, and the first quick one of `demo_estimate_2_cores.json`, beside busy processes, with AVX-512 masked.
The second of that file was estimated at 4 to 7 minutes and took 6.8.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

MEASURED_S = 2.0
"""Seconds of measured steps, divided between the numbers of threads. Less varies by more than a tenth."""

MAX_SECONDS = 120.0
"""A measurement that takes longer is given up."""

TOKENS = 1_024
"""Tokens of a step: two blocks of 512, as in `models.py`."""

PROCESSES = 130.0
"""Work that does not depend on the demo's size, in imports of torch: processes, vLLM's start, the tokenizer."""

STEPS = {True: 125.0, False: 625.0}
"""Work that does, in steps of `measure_speed`, by `quick`."""

RANGE = (0.8, 1.5)
"""The expected time is given from and to these multiples, because the load of a machine changes within minutes."""

FEWER_THREADS_GAIN = 1.1
"""One thread is taken if it is this many times as fast as all: then other programs use the cores."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """`steps_per_s` of a training step in the shape of the teacher with `threads`; `start_s` to import torch.

    `most_threads`: the most that were measured.
    """

    steps_per_s: float
    start_s: float
    threads: int
    most_threads: int

    def expected_s(self, *, quick: bool) -> tuple[float, float]:
        """The shortest and the longest time, in seconds, that a whole demo should take."""
        seconds = PROCESSES * self.start_s + STEPS[quick] / self.steps_per_s
        return RANGE[0] * seconds, RANGE[1] * seconds

    def sentence(self, *, quick: bool) -> str:
        """What the demo prints at its start."""
        shortest, longest = (max(1, round(seconds / 60)) for seconds in self.expected_s(quick=quick))
        limited = ", with one thread, the fastest at this load" if self.threads < self.most_threads else ""
        return (
            f"This will take about {shortest} to {longest} minutes on this machine ({self.steps_per_s:.1f} training "
            f"steps per second{limited}), and longer if other programs use its cores."
        )


def measure_speed() -> Speed:
    """Take training steps for `MEASURED_S` seconds: feed-forward layers, a head of 8,192 ids, and AdamW."""
    began = time.perf_counter()
    import torch
    from torch import nn

    start_s = time.perf_counter() - began
    torch.manual_seed(0)
    width, feed_forward, vocabulary = 256, 768, 8_192
    blocks: list[nn.Module] = []
    for _ in range(4):
        blocks += [nn.Linear(width, 3 * width), nn.SiLU(), nn.Linear(3 * width, feed_forward), nn.SiLU()]
        blocks += [nn.Linear(feed_forward, width)]
    model = nn.Sequential(nn.Embedding(vocabulary, width), *blocks, nn.Linear(width, vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(vocabulary, (TOKENS,))

    def step() -> None:
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def rate(threads: int, seconds: float) -> float:
        torch.set_num_threads(threads)
        step()
        steps, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            step()
            steps += 1
        return steps / elapsed

    numbers = sorted({1, torch.get_num_threads()})
    rates = {threads: rate(threads, MEASURED_S / len(numbers)) for threads in numbers}
    most = numbers[-1]
    threads = 1 if rates[1] > FEWER_THREADS_GAIN * rates[most] else most
    return Speed(steps_per_s=rates[threads], start_s=start_s, threads=threads, most_threads=most)


def speed_of(environment: Mapping[str, str]) -> Speed | None:
    """Measure in a new process; None if that fails: the demo does not need the estimate."""
    program = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            program, env=dict(environment), check=True, stdout=subprocess.PIPE, text=True, timeout=MAX_SECONDS
        )
        return Speed(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError):
        return None


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Let processes that the block starts use this many OpenMP threads, unless the user has set a number."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


if __name__ == "__main__":
    print(json.dumps(asdict(measure_speed())))
