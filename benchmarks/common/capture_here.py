"""Captures a dataset in this process, without Ray: for benchmarks with small teachers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.worker import CaptureWorker
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes


def capture_here(settings: Mapping[str, Any], *, desc: str) -> None:
    """Run the capture with these settings, whose output is a folder, unless it is sealed already.

    Raises what `prepare` and `CaptureWorker` raise.
    """
    config = CaptureConfig.model_validate(settings)
    if (Path(config.output) / MANIFEST_NAME).exists():
        return
    prepare(config)
    worker = CaptureWorker(config)
    for unit in tqdm(plan_from_bytes(worker.store.read(PLAN_NAME), where=PLAN_NAME), desc=desc, leave=False):
        worker.run(unit.index)
    seal(worker.store)
