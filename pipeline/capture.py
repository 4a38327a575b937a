"""A whole capture: take the lease, prepare, do the units that are not committed, seal. Settings in, a sealed dataset
out.

The driver itself holds little: the plan as columns, the numbers of units, and no row, commit record or log-prob.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, Field
from tqdm import tqdm

from coldstill.storage_schema.commits import CommitRecord, committed_units, read_commit
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, MAX_SEALED_UNITS, read_manifest, seal
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.store import Store

from .config import CaptureConfig
from .driver.bar import DriverBar
from .driver.lease import Lease
from .driver.progress import Progress
from .driver.progress_record import read_progress
from .errors import CaptureIncomplete, TooManyUnits
from .prepare import Prepared, prepare
from .sources.staging import remove_staging

if TYPE_CHECKING:
    from .cluster import Workforce

_MOST_NAMED = 20


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

    Raises `LeaseHeld` where another driver is at work; `CaptureIncomplete` at the end, where units could not be done;
    and the named errors of the configuration, source, teacher, cluster and store.
    """
    started = time.monotonic()
    from .cluster import Workforce

    store = Store(config.output)
    store.require_writable()
    workforce = Workforce(config)
    with (
        Lease(store, dead_after_s=config.cluster.driver_dead_after_s) as lease,
        Progress(
            store, token=lease.token, work=workforce, price_per_gpu_hour=config.cluster.price_per_gpu_hour
        ) as progress,
    ):
        with workforce:
            prepared = _prepare(config, workforce)
            if not store.exists(MANIFEST_NAME):
                progress.begin()
                _do(prepared, workforce, lease=lease, progress=progress)
        _seal(store, units=len(prepared.units), progress=progress)
    return _summary(store, time.monotonic() - started)


def _prepare(config: CaptureConfig, workforce: Workforce) -> Prepared:
    def rank_ids(header: DatasetHeader, unit: Unit) -> list[int]:
        with tqdm(total=config.calibration_targets, desc="calibration", unit=" targets") as bar:
            bar.set_postfix_str("starting a worker")
            ranks = workforce.rank_ids(header, unit)
            bar.set_postfix_str(f"{len(ranks):,} frequent ids")
            bar.update(config.calibration_targets)
        return ranks

    prepared = prepare(config, rank_ids=rank_ids if config.calibration_targets else None)
    if len(prepared.units) > MAX_SEALED_UNITS:
        raise TooManyUnits(
            f"{config.output}: plan",
            found=f"{len(prepared.units):,} units of {config.rows_per_unit} rows",
            wanted=f"at most {MAX_SEALED_UNITS:,}, which one manifest can list",
            fix="raise rows_per_unit and choose another output, or capture parts of the source and merge them",
        )
    return prepared


class Remaining(NamedTuple):
    """What a start has to do: units that are not committed, and the source rows of those that are."""

    todo: list[int]
    rows_done: int


def remaining(prepared: Prepared) -> Remaining:
    """From the plan and the names of commit records; none is opened. Raises `StorageFailed`."""
    done = committed_units(prepared.store)
    todo = [unit for unit in range(len(prepared.units)) if unit not in done]
    return Remaining(todo, prepared.units.rows_of(done))


def _do(prepared: Prepared, workforce: Workforce, *, lease: Lease, progress: Progress) -> None:
    """Do the units that are not committed. Raises `CaptureIncomplete`, `LeaseLost`."""
    plan, (todo, rows_done) = prepared.units, remaining(prepared)
    if not todo:
        return
    with DriverBar(progress, work=workforce, rows=plan.total_rows, rows_done=rows_done) as bar:
        for report in workforce.run_units(todo):
            lease.check()
            progress.add(report)
            bar.add(report)
    if workforce.failed:
        named = [f"unit {failed.unit}: {failed.reason}" for failed in workforce.failed[:_MOST_NAMED]]
        more = len(workforce.failed) - len(named)
        raise CaptureIncomplete(
            f"{prepared.store.url}: {len(workforce.failed):,} of {len(plan):,} units failed",
            found="\n          ".join([*named, *([f"... and {more:,} more"] if more else [])]),
            wanted="a shard of each planned unit",
            fix="all other units are committed; mend what the reasons name and start the same capture again",
        )


def _seal(store: Store, *, units: int, progress: Progress) -> None:
    seconds = 0.0
    with tqdm(total=units, desc="seal", unit=" units", delay=3) as bar:

        def read(commit: CommitRecord) -> None:
            nonlocal seconds
            seconds += _score_seconds(commit)
            bar.update()

        seal(store, on_commit=read)
    remove_staging(store)
    if bar.n:  # else it was sealed already
        progress.sealed(score_seconds=seconds)


def _summary(store: Store, wall_s: float) -> CaptureSummary:
    manifest, dataset_id = read_manifest(store)
    record = read_progress(store)
    seconds = record.score_seconds if record else None
    if seconds is None:  # killed between the manifest and the last record
        seconds = sum(_score_seconds(read_commit(store, shard.unit)) for shard in manifest.shards)
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


def _score_seconds(commit: CommitRecord) -> float:
    return float(commit.environment.get("score_seconds", 0))
