"""A whole capture: prepare, do the units that are not committed, seal. Settings in, a sealed dataset out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field
from tqdm import tqdm

from storage_schema.commits import committed_units, read_commit
from storage_schema.header import DatasetHeader
from storage_schema.manifest import read_manifest, seal
from storage_schema.plan import Unit
from storage_schema.store import Store

from .config import CaptureConfig
from .prepare import prepare

if TYPE_CHECKING:
    from .cluster import Workforce


class CaptureSummary(BaseModel):
    """What came out, over all starts of the capture."""

    dataset_id: str
    units: int
    rows: int
    rejected: int
    tokens: int
    targets: int
    bytes: int = Field(description="Of all shards.")
    bytes_per_target: float
    tokens_per_s: float = Field(description="Of one worker while its teacher scores; engine starts do not count.")
    wall_s: float = Field(description="Of this start.")


def capture(config: CaptureConfig) -> CaptureSummary:
    """Do what is missing of the capture and seal the dataset. Safe to call again after any kill.

    Raises the named errors of the configuration, source, teacher, cluster and store.
    """
    started = time.monotonic()
    from .cluster import Workforce

    with Workforce(config) as workforce:

        def rank_ids(header: DatasetHeader, unit: Unit) -> list[int]:
            with tqdm(total=config.pilot_targets, desc="pilot", unit=" targets") as bar:
                bar.set_postfix_str("starting a worker")
                ranks = workforce.rank_ids(header, unit)
                bar.set_postfix_str(f"{len(ranks):,} frequent ids")
                bar.update(config.pilot_targets)
            return ranks

        prepared = prepare(config, rank_ids=rank_ids if config.pilot_targets else None)
        done = committed_units(prepared.store)
        todo = [unit.index for unit in prepared.units if unit.index not in done]
        if todo:
            _do(todo, workforce, total=sum(unit.rows for unit in prepared.units), rows_done=_rows(prepared.units, done))
    seal(prepared.store)
    return _summary(prepared.store, time.monotonic() - started)


def _rows(units: list[Unit], done: set[int]) -> int:
    return sum(unit.rows for unit in units if unit.index in done)


def _do(todo: list[int], workforce: Workforce, *, total: int, rows_done: int) -> None:
    with tqdm(total=total, initial=rows_done, desc="capture", unit=" rows", smoothing=0) as bar:
        bar.set_postfix_str("starting workers")
        targets = 0
        for report in workforce.run_units(todo):
            targets += report.targets
            bar.update(report.rows + report.rejected)
            bar.set_postfix_str(f"{targets:,} targets, unit {report.unit} committed")


def _summary(store: Store, wall_s: float) -> CaptureSummary:
    manifest, dataset_id = read_manifest(store)
    commits = [read_commit(store, shard.unit) for shard in manifest.shards]
    seconds = sum(float(commit.environment.get("score_seconds", 0)) for commit in commits)
    size = sum(shard.file.bytes for shard in manifest.shards)
    return CaptureSummary(
        dataset_id=dataset_id,
        units=len(manifest.shards),
        rows=manifest.rows,
        rejected=manifest.rejected,
        tokens=manifest.tokens,
        targets=manifest.targets,
        bytes=size,
        bytes_per_target=size / max(1, manifest.targets),
        tokens_per_s=manifest.tokens / seconds if seconds else 0.0,
        wall_s=wall_s,
    )
