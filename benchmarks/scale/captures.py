"""Captures with any number of units, of one tiny row each, and commit records made by hand."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from coldstill.pipeline.config import CaptureConfig
from coldstill.storage_schema.commits import COMMITS_FOLDER, CommitRecord, commit_name
from coldstill.storage_schema.verified_files import FileRecord
from tests.making import chat_model

TOP_K = 4


def new_capture(folder: Path, *, units: int, output: str | None = None, **cluster: Any) -> CaptureConfig:
    """A source with `units` rows, one per unit, and a teacher that is never loaded. Writes `capture.yaml`."""
    teacher = folder.parent / "teacher"
    if not teacher.exists():
        chat_model(teacher)
    folder.mkdir()
    source = folder / "rows.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(f'{{"text": "row number {row}"}}\n' for row in range(units))
    config = CaptureConfig.model_validate(
        {
            "output": output or str(folder / "dataset"),
            "source": {"path": str(source)},
            "teacher": {"model": str(teacher), "engine": "transformers", "top_k": TOP_K, "max_length": 64},
            "rows_per_unit": 1,
            "calibration_targets": 0,
            "cluster": {"cpus_per_worker": 0.1, **cluster},
        }
    )
    (folder / "capture.yaml").write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    return config


def record_of(unit: int) -> bytes:
    """A commit record as a worker writes it."""
    shard = FileRecord(name=f"shards/{unit:06d}-{'0' * 12}.parquet", bytes=2000, sha256="0" * 64)
    record = CommitRecord(
        unit=unit, shard=shard, rows=1, tokens=20, targets=19, rejected=0, environment={"score_seconds": 0.1}
    )
    return record.model_dump_json(indent=2).encode()


def pretend_committed(root: Path, units: Iterable[int]) -> None:
    """Write a commit record for each of these units."""
    (root / COMMITS_FOLDER).mkdir(parents=True, exist_ok=True)
    for unit in tqdm(units, desc="commit records", unit=" files", delay=3):
        descriptor = os.open(root / commit_name(unit), os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, record_of(unit))
        os.close(descriptor)
