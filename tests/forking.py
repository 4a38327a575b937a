"""Processes that start in a tenth of a second: forked from one that has imported what takes long.

A process has one such server, and what it has imported is settled when it starts: all tests share this one.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "coldstill.pipeline.teachers.transformers_teacher",
    "coldstill.trainer.train",
    "tests.chaos.forked",
    "tests.chaos.training_points",
    "tests.pipeline.capturing",
    # Imported by what is imported above, but only when it is first used.
    "fsspec.implementations.local",
    "pandas",
    "pyarrow.compute",
    "s3fs",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.modeling_llama",
]


def fork_server() -> ForkServerContext:
    """The context whose `Process` and `Pipe` to use."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(_PRELOADED)
    return processes
