"""Occupancy of an engine while it generates answers of different lengths, in order `exact` and `fast`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inputs.tiny_teachers import CONTEXT, config_of, header_of
from coldstill.pipeline.config import SamplingConfig
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.worker import load_teacher

PLACES = 8
"""Number of requests that the engine runs at a time, and of prompts per unit."""


def occupancy(folder: Path, *, vocabulary: int, units: int) -> dict[str, float]:
    """Order -> share of the engine's places that produced a token, over all steps."""
    generator = np.random.default_rng(0)
    # The room after a prompt is the length of its answer. Like real answers, most are short and a few are long.
    rooms = np.minimum(8 + generator.exponential(40, (units, PLACES)).astype(int), CONTEXT - 8)
    prompts = [
        [
            TokenSequence(
                sample_id=f"{unit}-{row}",
                source_row=unit * PLACES + row,
                token_ids=generator.integers(2, vocabulary, CONTEXT - int(room)).astype(np.int32),
                target_spans=np.empty((0, 2), np.int32),
            )
            for row, room in enumerate(rooms[unit])
        ]
        for unit in range(units)
    ]
    header = header_of(vocabulary=vocabulary, top_k=16, mode="generate")
    sampling = SamplingConfig(max_tokens=CONTEXT, temperature=1.0)
    teacher: Any = load_teacher(config_of(folder, top_k=16, seqs=PLACES), header, sampling)
    shares = {}
    for order in ("exact", "fast"):
        before = teacher.progress
        tokens = _answer_all(teacher, prompts, overlapping=order == "fast")
        shares[order] = tokens / ((teacher.progress - before) * PLACES)
    return shares


def _answer_all(teacher: Any, prompts: list[list[TokenSequence]], *, overlapping: bool) -> int:
    one_at_a_time = nullcontext() if overlapping else threading.Lock()

    def answer(unit: list[TokenSequence]) -> int:
        with one_at_a_time:
            return sum(scored.targets.positions for scored in teacher.score(unit))

    with ThreadPoolExecutor(2) as threads:
        return sum(threads.map(answer, prompts))
