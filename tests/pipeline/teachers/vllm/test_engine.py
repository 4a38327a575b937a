"""An engine lives as long as its teacher."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests import making
from tests.pipeline.teachers.parallel_engine import teacher_of


def _engines() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name == "engine"}


@pytest.mark.slow
def test_an_engine_ends_and_frees_its_cache_with_its_teacher(tmp_path: Path) -> None:
    """The cache of keys and values is 1 GiB on a CPU, and a process with a dozen engines once ran out of memory."""
    pytest.importorskip("vllm")
    folder, before = making.tiny_llama(tmp_path / "teacher"), _engines()
    teacher, rows = teacher_of("text", folder)
    os.environ.pop("LD_PRELOAD", None)  # set by vLLM for its children; the other tests start children too
    assert len(teacher.score(rows)) == len(rows)
    (own,) = _engines() - before
    held = psutil.Process().memory_info().rss
    del teacher
    gc.collect()
    until = time.monotonic() + 60
    while own in _engines() and time.monotonic() < until:
        time.sleep(0.05)
    assert own not in _engines()
    gc.collect()
    assert held - psutil.Process().memory_info().rss > 1 << 29
