"""Helpers of capture tests: a complete configuration on disk, and the files of a dataset directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from coldstill.pipeline.calibration import Calibration, calibrate
from coldstill.pipeline.cluster.pool import WorkerPool
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.teachers.protocol import Teacher
from coldstill.pipeline.worker import CaptureWorker, UnitReport, load_for, load_teacher
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_from_bytes
from coldstill.storage_schema.store import Store
from tests import making


def capture_config(folder: Path, *, rows: int = 40, output: str = "dataset", **changes: Any) -> CaptureConfig:
    """A capture of short chats by a tiny transformers teacher, in units of ten rows; one row is rejected."""
    teacher = folder / "teacher"
    if not teacher.exists():
        making.chat_model(teacher)
        making.write_jsonl(folder / "rows.jsonl", [*making.chat_rows(rows), {"id": "useless"}])
    document: dict[str, Any] = {
        "output": str(folder / output),
        "source": {"path": str(folder / "rows.jsonl")},
        "teacher": {"model": str(teacher), "engine": "transformers", "top_k": 12, "draws": 4, "max_length": 256},
        "rows_per_unit": 10,
        "cluster": {"cpus_per_worker": 0.5},
    }
    for name, value in changes.items():
        document[name] = {**document.get(name, {}), **value} if isinstance(value, dict) else value
    return CaptureConfig.model_validate(document)


def write_config(path: Path, config: CaptureConfig) -> Path:
    """Write the configuration to a YAML file."""
    path.write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    return path


def contents(root: Path | str, folder: str = "shards") -> dict[str, str]:
    """Digest of each file in a folder of a dataset."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(root, folder).iterdir())}


class OneWorkerPool(WorkerPool):
    """The pool of a capture with one worker in this process instead of Ray's."""

    def calibrate(self, header: DatasetHeader, unit: Unit) -> Calibration:
        """The calibration pass by a teacher that is loaded for it."""
        return calibrate(self._config, self._teacher(header), header, unit)

    def run_units(self, todo: list[int]) -> Iterator[UnitReport]:
        """Run the units one after the other."""
        store = Store(self._config.output)
        header = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
        worker = CaptureWorker(self._config, self._teacher(header))
        yield from map(worker.run, todo)

    def _teacher(self, header: DatasetHeader) -> Teacher:
        return load_for(self._config, header, self._load or load_teacher)


def do_units(config: CaptureConfig) -> None:
    """Run all units that are not committed, one after the other, as one worker."""
    worker = CaptureWorker(config)
    for unit in plan_from_bytes(worker.store.read(PLAN_NAME), where=PLAN_NAME):
        worker.run(unit.index)
