"""The sides of `benchmarks.capture`: each reads the same units, and commits shards or discards its results."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

from benchmarks.capture.floor import install_floor, run_requests
from benchmarks.inputs import CACHE
from benchmarks.inputs.tiny_teachers import config_of, header_of, tiny_teacher, units_of_rows
from coldstill.pipeline.teachers.protocol import Teacher, TokenSequence, scored_of
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.store import Store

DRAWS = 64

Units = Sequence[Sequence[TokenSequence]]


def commit_all(teacher: Teacher, header: DatasetHeader, units: Units, *, overlapping: bool) -> None:
    """Score units and commit their shards, two at a time. Without `overlapping`, teacher calls run one by one."""
    one_at_a_time = nullcontext() if overlapping else threading.Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        store = Store(folder)

        def do(index: int) -> None:
            with one_at_a_time:
                scored = teacher.score(units[index])
            rows = [one.row for one in scored_of(scored)]
            commit_unit(store, index, rows=rows, rejects=[], header=header, environment={})

        for done in [threads.submit(do, index) for index in range(len(units))]:
            done.result()


def sides_of(
    vocabulary: int, top_k: int, *, units: int, rows: int, tokens: int
) -> dict[str, tuple[Callable[[], None], int]]:
    """Side -> its call, and the number of tokens that it reads."""
    folder = tiny_teacher(CACHE, vocabulary=vocabulary)
    full = units_of_rows(vocabulary=vocabulary, units=units, rows=rows, tokens=tokens, target_share=1.0)
    quarter = units_of_rows(vocabulary=vocabulary, units=units, rows=rows, tokens=tokens, target_share=0.25)
    plain = header_of(vocabulary=vocabulary, top_k=top_k)
    drawing = header_of(vocabulary=vocabulary, top_k=top_k, draws=DRAWS)
    derived = header_of(vocabulary=vocabulary, top_k=top_k, tail="derived")
    tap: Any = load_teacher(config_of(folder, top_k=top_k), plain)
    draws = load_teacher(config_of(folder, top_k=top_k), drawing)
    public = load_teacher(config_of(folder, top_k=top_k, tap="public"), derived)
    reference = load_teacher(config_of(folder, engine="transformers", top_k=top_k), plain)
    install_floor(tap._engine)
    everything = [sequence for unit in full for sequence in unit]
    calls: dict[str, Callable[[], None]] = {
        "bare prefill": lambda: run_requests(tap._engine, everything, top_k=None),
        "floor": lambda: run_requests(tap._engine, everything, top_k=top_k),
        "tap, exact": lambda: commit_all(tap, plain, full, overlapping=False),
        "tap, fast": lambda: commit_all(tap, plain, full, overlapping=True),
        "tap, exact, draws": lambda: commit_all(draws, drawing, full, overlapping=False),
        "tap, fast, draws": lambda: commit_all(draws, drawing, full, overlapping=True),
        "public": lambda: commit_all(public, derived, full, overlapping=False),
        "transformers": lambda: commit_all(reference, plain, full, overlapping=False),
        "tap, exact, a quarter": lambda: commit_all(tap, plain, quarter, overlapping=False),
        "public, a quarter": lambda: commit_all(public, derived, quarter, overlapping=False),
    }
    return {name: (call, sum(len(unit) for unit in full) * tokens) for name, call in calls.items()}
