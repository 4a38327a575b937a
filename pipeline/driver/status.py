"""Reads the status of a capture from its dataset directory alone, and the files of `progress/`.

Committed units are counted by the names of their commit records, without opening any. The lease shows whether a driver
is alive, and the progress record shows the rest. For a sealed dataset the manifest is enough.

`progress/` holds one record per start of a driver. A new start adds the records that it finds to its own (`earlier`),
lists them there (`folded`) and deletes them. So there are one or two files after any number of starts, totals cover all
starts, and a kill between adding and deleting counts nothing twice.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from coldstill.common.models import FrozenModel, parse_document
from coldstill.storage_schema.commits import committed_units
from coldstill.storage_schema.errors import CommitDamaged, DatasetNotFound, InvalidHeader, UnsupportedFormat
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, absent, read_manifest
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.storage_schema.store import Store

from .lease import LeaseRecord, read_lease

PROGRESS_FOLDER = "progress"
MAX_LISTED = 1000
"""Maximum number of failed, and of running, units in a record. Their counts are complete."""

RecordState = Literal["running", "sealed", "incomplete", "interrupted", "stopped"]
State = Literal["starting", "running", "dead", "interrupted", "stopped", "incomplete", "idle", "sealed"]
MEANING: dict[State, str] = {
    "starting": "a driver is preparing the source, the plan and the first engine",
    "running": "a driver is running",
    "dead": "the driver died: re-run the same command to resume",
    "interrupted": "the capture was interrupted: re-run the same command to resume",
    "stopped": "an error stopped the capture: fix it and re-run the same command to resume",
    "incomplete": "some units failed: fix the reasons and re-run the same command to resume",
    "idle": "no driver is running: re-run the same command to resume",
    "sealed": "all units are done, and the dataset is sealed",
}


class Totals(FrozenModel):
    """What was captured, and the time and money it took."""

    starts: int = 0
    units: int = 0
    rows: int = Field(default=0, description="Source rows, rejected ones included.")
    tokens: int = 0
    targets: int = 0
    bytes: int = Field(default=0, description="Bytes of the shards.")
    worker_seconds: float = Field(default=0, description="Time of all workers that were ready, busy or idle.")
    gpu_seconds: float = Field(default=0, description="`worker_seconds` times the number of GPUs per worker.")
    cost: float | None = Field(default=None, description="Cost of the starts that had `price_per_gpu_hour` set.")

    def __add__(self, other: Totals) -> Totals:
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        sums = {name: getattr(self, name) + getattr(other, name) for name in Totals.model_fields if name != "cost"}
        return Totals(**sums, cost=sum(costs) if costs else None)


class Failure(FrozenModel):
    """A unit that was given up, and why."""

    unit: int
    reason: str


class ProgressRecord(FrozenModel):
    """One start of a driver; times in seconds of the Unix clock."""

    token: str
    state: RecordState
    error: str | None = Field(default=None, description="The error that stopped this start.")
    started: float
    written: float
    own: Totals
    earlier: Totals
    folded: tuple[str, ...] = Field(description="Tokens of the starts that `earlier` includes.")
    workers: int = Field(description="Number of workers that were ready at the time of writing.")
    running: dict[int, str] = Field(description="Units in progress, and their workers.")
    failed: tuple[Failure, ...]
    failed_units: int
    tokens_per_s: float | None = Field(
        description="Tokens per second of all workers, in the last ten minutes; null until a unit ended."
    )
    rows_per_s: float | None
    score_seconds: float | None = Field(description="Scoring time of all units; known once sealed.")
    rejected: dict[str, int] = Field(default={}, description="Rejected source rows of all starts, by reason.")

    @property
    def totals(self) -> Totals:
        """Totals of all starts."""
        return self.own + self.earlier


class Status(FrozenModel):
    """A capture at one moment; unknown values are null."""

    root: str
    state: State
    error: str | None = Field(default=None, description="The error that stopped the last driver.")
    dataset_id: str | None = None
    driver: str | None = Field(default=None, description="The driver that holds the lease, and its last heartbeat.")
    heartbeat_age_s: float | None = None
    units_planned: int | None = None
    units_done: int
    units_running: int
    units_failed: int
    rows_planned: int | None = None
    rows_done: int | None = Field(default=None, description="Source rows, rejected ones included.")
    teacher_saw: str | None = Field(default=None, description="That the teacher has another prompt, if it has one.")
    totals: Totals = Field(
        description="Totals of all starts; the last seconds before a kill are missing until the dataset is sealed."
    )
    rejected: dict[str, int] = Field(default={}, description="Rejected source rows by reason.")
    workers: int = Field(description="Workers that are ready now.")
    tokens_per_s: float | None = Field(
        default=None, description="Tokens per second of all workers, in the last ten minutes."
    )
    time_left_s: float | None = None
    running: dict[int, str] = Field(default_factory=dict, description="Units in progress, and their workers.")
    failed: tuple[Failure, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether no driver is running, so that nothing will change."""
        return self.state not in ("starting", "running")


def read_status(root: str) -> Status:
    """The state of the capture at `root`. Raises `DatasetNotFound`, `CommitDamaged`, `StorageFailed`."""
    store = Store(root)
    if store.is_local and not Path(store.root).is_dir():
        raise _absent(store)  # before progress is looked for in a file
    record = read_progress(store)
    if store.exists(MANIFEST_NAME):
        return _with_header(store, _sealed(store, record))
    lease = read_lease(store)
    if lease is None and not store.exists(HEADER_NAME):
        raise _absent(store)
    return _with_header(store, _unsealed(store, record, lease))


def _absent(store: Store) -> DatasetNotFound:
    hint = "; a capture that was just started needs a few seconds"
    return absent(store, found="neither a dataset nor a running capture", hint=hint)


def _with_header(store: Store, status: Status) -> Status:
    """The status with what the header says, if there is one that can be read."""
    with suppress(FileNotFoundError, InvalidHeader, UnsupportedFormat):
        header = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
        return status.model_copy(update={"teacher_saw": header.teacher_saw})
    return status


def read_progress(store: Store) -> ProgressRecord | None:
    """The record of the newest start. Raises `StorageFailed`."""
    records = read_records(store)
    folded = {token for record in records for token in record.folded}
    return max(
        (record for record in records if record.token not in folded), key=lambda record: record.started, default=None
    )


def read_records(store: Store) -> list[ProgressRecord]:
    """All records in `progress/` that can be read: a damaged one costs the totals of its start, and nothing else.

    Raises `StorageFailed`.
    """
    records = []
    for name in store.names(PROGRESS_FOLDER):
        path = f"{PROGRESS_FOLDER}/{name}"
        with suppress(FileNotFoundError, CommitDamaged):  # a later start may have deleted it meanwhile
            records.append(parse_document(store.read(path), model=ProgressRecord, where=path, error=CommitDamaged))
    return records


def record_name(token: str) -> str:
    """Name of a start's record."""
    return f"{PROGRESS_FOLDER}/{token}.json"


def _sealed(store: Store, record: ProgressRecord | None) -> Status:
    manifest, dataset_id = read_manifest(store)
    rows = manifest.rows + manifest.rejected
    if record is not None:  # captured here: a row of the source may have become several rows, or a part of one
        with suppress(FileNotFoundError, CommitDamaged):
            rows = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME).total_rows
    counted = {
        "units": len(manifest.shards),
        "rows": rows,
        "tokens": manifest.tokens,
        "targets": manifest.targets,
        "bytes": sum(shard.file.bytes for shard in manifest.shards),
    }
    return Status(
        root=store.url,
        state="sealed",
        dataset_id=dataset_id,
        units_planned=len(manifest.shards),
        units_done=len(manifest.shards),
        units_running=0,
        units_failed=0,
        rows_planned=rows,
        rows_done=rows,
        totals=(record.totals if record else Totals()).model_copy(update=counted),
        rejected=record.rejected if record else {},
        workers=0,
    )


def _unsealed(store: Store, record: ProgressRecord | None, lease: LeaseRecord | None) -> Status:
    plan = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME) if store.exists(PLAN_NAME) else None
    done = committed_units(store)
    rows_planned, rows_done = (plan.total_rows, plan.rows_of(done)) if plan is not None else (None, None)
    is_alive = lease is not None and not lease.is_dead
    # Until a new driver has written its own record, the record is that of an earlier driver.
    is_current = record is not None and (lease is None or record.token == lease.token)
    state: State
    if lease is not None:
        state = ("running" if is_current else "starting") if is_alive else "dead"
    elif record is None or record.state in ("running", "sealed"):
        state = "idle"
    else:
        state = record.state
    now = record if is_current and is_alive else None
    rate = now.rows_per_s if now else None
    return Status(
        root=store.url,
        state=state,
        error=record.error if record and state == "stopped" else None,
        driver=lease.name if lease else None,
        heartbeat_age_s=lease.age_s if lease else None,
        units_planned=len(plan) if plan is not None else None,
        units_done=len(done),
        units_running=len(now.running) if now else 0,
        units_failed=record.failed_units if record and is_current else 0,
        rows_planned=rows_planned,
        rows_done=rows_done,
        totals=record.totals if record else Totals(),
        rejected=record.rejected if record else {},
        workers=now.workers if now else 0,
        tokens_per_s=now.tokens_per_s if now else None,
        time_left_s=(rows_planned - rows_done) / rate
        if rows_planned is not None and rows_done is not None and rate
        else None,
        running=now.running if now else {},
        failed=record.failed if record and is_current else (),
    )
