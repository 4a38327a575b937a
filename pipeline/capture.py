"""Runs a whole capture: takes the lease, prepares, runs the units that are not committed, seals.

The driver holds the plan as columns and the numbers of units in memory, but no row, commit record or log-prob.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, Field

from coldstill.common.interrupts import raising_interrupts
from coldstill.common.progress import tqdm
from coldstill.storage_schema.commits import CommitRecord, committed_units, read_commit
from coldstill.storage_schema.errors import UnitsMissing
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, MAX_SEALED_UNITS, read_manifest, seal
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.repair import Reopened, reopen_damaged
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.store.retrying import RetryingStore

from .calibration import warn_if_flat
from .config import CaptureConfig
from .driver.lease import Lease
from .driver.progress import Progress, ProgressBar
from .driver.status import read_progress
from .errors import CaptureIncomplete, TooManyUnits, all_rejected
from .prepare import Prepared, prepare
from .reject_reasons import reject_reasons_of
from .sources.staging import remove_staging

if TYPE_CHECKING:
    from .cluster.pool import WorkerPool

_MAX_SEALS = 3
"""Files that are lost again and again, while the capture runs, end it."""
_MAX_LISTED = 20
"""Maximum number of failed units in the error message."""


class CaptureSummary(BaseModel):
    """The finished dataset, over all starts of the capture."""

    dataset_id: str
    units: int
    rows: int
    rejected: int
    reject_reasons: dict[str, int] = Field(default={}, description="Rejected rows by reason.")
    read_as: tuple[str, ...] = Field(default=(), description="How columns of recognized layouts were read.")
    teacher_saw: str | None = Field(default=None, description="That the teacher had another prompt, if it had one.")
    tokens: int
    targets: int
    bytes: int = Field(description="Bytes of all shards.")
    bytes_per_target: float
    tokens_per_s: float = Field(description="Tokens per second of one worker, while its teacher scores.")
    wall_s: float = Field(description="Seconds, of this start only.")
    repaired: str | None = Field(default=None, description="What was damaged and made again, if anything was.")


def capture(config: CaptureConfig, *, repair: bool = False) -> CaptureSummary:
    """Run the units that are not committed yet and seal the dataset. Safe to call again after any kill.

    Units with a lost or cut file are made again, also in a sealed dataset. `repair`: all files are read, and units with
    a file whose bytes have changed are made again too.

    Raises `LeaseHeld` if another driver is running, `CaptureIncomplete` at the end if units failed, `Interrupted` for
    Ctrl-C and SIGTERM, and the named errors of the configuration, source, teacher, cluster and store.
    """
    started = time.monotonic()
    from .cluster.pool import WorkerPool

    store = RetryingStore(config.output, retry_for_s=config.cluster.store_retry_s, is_first=True)
    pool = WorkerPool(config)
    with (
        raising_interrupts(),
        _no_empty_folder_left(store),
        Lease(store, dead_after_s=config.cluster.driver_dead_after_s) as lease,
        Progress(store, token=lease.token, work=pool, price_per_gpu_hour=config.cluster.price_per_gpu_hour) as progress,
    ):
        reopened = reopen_damaged(store, deep=repair)
        for seals_left in reversed(range(_MAX_SEALS)):
            with pool:
                prepared = _prepare(config, pool, store)
                if not store.exists(MANIFEST_NAME):
                    progress.begin()
                    _run_units(prepared, pool, lease=lease, progress=progress)
            lease.check()
            try:
                _seal(store, units=len(prepared.units), progress=progress)
                break
            except UnitsMissing as error:  # files of committed units were lost: these units are made again
                if not seals_left:
                    raise
                tqdm.write(f"{error.what}: {error.found}. They are made again.", file=sys.stderr)
    return _summary(prepared, time.monotonic() - started, reopened)


@contextmanager
def _no_empty_folder_left(store: Store) -> Iterator[None]:
    """Create the output, and remove the folders that hold no file afterwards, as after a refused configuration."""
    is_new = store.is_local and not Path(store.root).exists()
    store.require_writable()
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # a folder with files stays
                for folder in (*Path(store.root).iterdir(), Path(store.root)):
                    folder.rmdir()


def _prepare(config: CaptureConfig, pool: WorkerPool, store: Store) -> Prepared:
    def rank_ids(header: DatasetHeader, unit: Unit) -> tuple[int, ...]:
        with tqdm(total=config.calibration_targets, desc="calibration", unit=" targets") as bar:
            bar.set_postfix_str("starting a worker")
            ranks, tail_mass = pool.calibrate(header, unit)
            bar.set_postfix_str(f"{len(ranks):,} frequent ids")
            bar.update(config.calibration_targets)
        warn_if_flat(config.teacher, tail_mass)
        return ranks

    prepared = prepare(config, rank_ids=rank_ids if config.calibration_targets else None, store=store)
    if len(prepared.units) > MAX_SEALED_UNITS:
        raise TooManyUnits(
            f"{config.output}: plan",
            found=f"{len(prepared.units):,} units of {config.rows_per_unit} rows",
            wanted=f"at most {MAX_SEALED_UNITS:,}, which one manifest can list",
            fix="raise rows_per_unit and choose another output, or capture parts of the source and merge them",
        )
    return prepared


class Remaining(NamedTuple):
    """Units that are not committed (`todo`), and the number of source rows in those that are."""

    todo: list[int]
    rows_done: int


def remaining(prepared: Prepared) -> Remaining:
    """Compare the plan with the names of the commit records, without opening any. Raises `StorageFailed`."""
    done = committed_units(prepared.store)
    todo = [unit for unit in range(len(prepared.units)) if unit not in done]
    return Remaining(todo, prepared.units.rows_of(done))


def _run_units(prepared: Prepared, pool: WorkerPool, *, lease: Lease, progress: Progress) -> None:
    """Run the units that are not committed. Raises `CaptureIncomplete`, `LeaseLost`."""
    plan, (todo, rows_done) = prepared.units, remaining(prepared)
    if not todo:
        return
    with ProgressBar(progress, work=pool, rows=plan.total_rows, rows_done=rows_done) as bar:
        for report in pool.run_units(todo):
            lease.check()
            rows = plan[report.unit].rows
            progress.add(report, source_rows=rows)
            bar.add(rows)
    if pool.failed:
        reasons = [f"unit {failed.unit}: {failed.reason}" for failed in pool.failed[:_MAX_LISTED]]
        more = len(pool.failed) - len(reasons)
        raise CaptureIncomplete(
            f"{prepared.store.url}: {len(pool.failed):,} of {len(plan):,} units failed",
            found="\n          ".join([*reasons, *([f"... and {more:,} more"] if more else [])]),
            wanted="a shard of each planned unit",
            fix="all other units are committed: fix these reasons and re-run the same command to resume",
        )


def _seal(store: Store, *, units: int, progress: Progress) -> None:
    seconds, rows = 0.0, 0
    rejected: Counter[str] = Counter()
    with tqdm(total=units, desc="seal", unit=" units", delay=3) as bar:

        def read(commit: CommitRecord) -> None:
            nonlocal seconds, rows
            seconds += _score_seconds(commit)
            rows += commit.rows
            rejected.update(reject_reasons_of(commit) or {"rejected": commit.rejected})
            bar.update()
            if bar.n == units and not rows and rejected.total():  # nothing is sealed
                raise all_rejected(rejected, what=f"{store.url}: all rows of the source", example=_example(store))

        seal(store, on_commit=read)
    remove_staging(store)
    if bar.n:  # 0: it was sealed before
        progress.sealed(score_seconds=seconds, rejected=dict(+rejected))


def _example(store: Store) -> str:
    """The first reject of a capture."""
    commit = read_commit(store, 0)
    line = store.read(commit.rejects.name).splitlines()[0] if commit.rejects else b"{}"
    reject = json.loads(line)
    return f"row {reject.get('source_row')}: {reject.get('detail')}"


def _summary(prepared: Prepared, wall_s: float, reopened: Reopened) -> CaptureSummary:
    store = prepared.store
    manifest, dataset_id = read_manifest(store)
    record = read_progress(store)
    seconds, rejected = (record.score_seconds, record.rejected) if record else (None, None)
    if seconds is None:  # a kill between the manifest and the last progress record
        commits = [read_commit(store, shard.unit) for shard in manifest.shards]
        seconds = sum(map(_score_seconds, commits))
        rejected = dict(sum((Counter(reject_reasons_of(commit)) for commit in commits), start=Counter()))
    size = sum(shard.file.bytes for shard in manifest.shards)
    return CaptureSummary(
        dataset_id=dataset_id,
        units=len(manifest.shards),
        rows=manifest.rows,
        rejected=manifest.rejected,
        reject_reasons=rejected or {},
        read_as=prepared.layouts,
        teacher_saw=prepared.header.teacher_saw,
        tokens=manifest.tokens,
        targets=manifest.targets,
        bytes=size,
        bytes_per_target=size / max(1, manifest.targets),
        tokens_per_s=manifest.tokens / seconds if seconds else 0.0,
        wall_s=wall_s,
        repaired=_repairs(reopened, dataset_id),
    )


def _repairs(reopened: Reopened, dataset_id: str) -> str | None:
    if not reopened.units and not reopened.files:
        return None
    found = [f"{len(reopened.units):,} units made again"]
    found += [f"lost or damaged: {', '.join(reopened.files[:_MAX_LISTED])}"] if reopened.files else []
    found += [f"the dataset id was {reopened.dataset_id}"] if reopened.dataset_id not in (None, dataset_id) else []
    return "; ".join(found)


def _score_seconds(commit: CommitRecord) -> float:
    return float(commit.environment.get("score_seconds", 0))
