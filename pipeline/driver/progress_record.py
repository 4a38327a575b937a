"""The files of `progress/`: one record per start of a driver, and how records are read.

A new start adds the records that it finds to its own (`earlier`), lists them there (`folded`) and deletes them. So
there are one or two files after any number of starts, totals cover all starts, and a kill between adding and deleting
counts nothing twice.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

from pydantic import Field

from coldstill.common.models import FrozenModel, parse_document
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.store import Store

PROGRESS_FOLDER = "progress"
MAX_LISTED = 1000
"""Failed and running units that a record lists, so that it stays small; their counts are complete."""

State = Literal["running", "sealed", "incomplete", "interrupted", "stopped"]


class Totals(FrozenModel):
    """What was captured, and the time and money it took."""

    starts: int = 0
    units: int = 0
    rows: int = Field(default=0, description="Source rows, rejected ones included.")
    tokens: int = 0
    targets: int = 0
    bytes: int = Field(default=0, description="Of the shards.")
    worker_seconds: float = Field(default=0, description="Of all workers that were ready, busy or idle.")
    gpu_seconds: float = Field(default=0, description="`worker_seconds` times the GPUs of a worker.")
    cost: float | None = Field(default=None, description="Of the starts that had `price_per_gpu_hour` set.")

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
    state: State
    error: str | None = Field(default=None, description="The error that stopped it.")
    started: float
    written: float
    own: Totals
    earlier: Totals
    folded: tuple[str, ...] = Field(description="Tokens of the starts that `earlier` includes.")
    workers: int = Field(description="Ready when this was written.")
    running: dict[int, str] = Field(description="Units in progress, and their workers.")
    failed: tuple[Failure, ...]
    failed_units: int
    tokens_per_s: float | None = Field(description="Of all workers, in the last ten minutes; null until a unit ended.")
    rows_per_s: float | None
    score_seconds: float | None = Field(description="Scoring time of all units; known once sealed.")

    @property
    def totals(self) -> Totals:
        """Of all starts."""
        return self.own + self.earlier


def read_progress(store: Store) -> ProgressRecord | None:
    """The record of the newest start. Raises `CommitDamaged`, `StorageFailed`."""
    records = read_records(store)
    folded = {token for record in records for token in record.folded}
    return max(
        (record for record in records if record.token not in folded), key=lambda record: record.started, default=None
    )


def read_records(store: Store) -> list[ProgressRecord]:
    """All records in `progress/`. Raises as `read_progress`."""
    records = []
    for name in store.names(PROGRESS_FOLDER):
        path = f"{PROGRESS_FOLDER}/{name}"
        with suppress(FileNotFoundError):  # a later start may have deleted it meanwhile
            records.append(parse_document(store.read(path), model=ProgressRecord, where=path, error=CommitDamaged))
    return records


def record_name(token: str) -> str:
    """Name of a start's record."""
    return f"{PROGRESS_FOLDER}/{token}.json"
