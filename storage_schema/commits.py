"""Commit records: the only sign that a unit is done.

A worker writes its shard under a name that holds its digest, then creates `commits/000000.json` only if it is absent.
The first record of a unit wins, whatever a late second attempt writes: the loser reads the winner's record and deletes
its own files. A file that no record names does not exist for readers; sealing removes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from .documents import parse_document
from .errors import CommitDamaged
from .header import DatasetHeader
from .rows import CachedRow
from .shard import write_shard
from .store import Store

COMMITS_FOLDER = "commits"
SHARDS_FOLDER = "shards"
REJECTS_FOLDER = "rejects"

_DIGEST = "^[0-9a-f]{64}$"


class Reject(NamedTuple):
    """A source row that could not be used, and why: nothing vanishes."""

    source_row: int
    sample_id: str
    reason: str
    detail: str


class FileRecord(BaseModel):
    """A file of the dataset: its relative name, size and sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_DIGEST)


class CommitRecord(BaseModel):
    """What unit `unit` became."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: int = Field(ge=0)
    shard: FileRecord
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    targets: int = Field(ge=0)
    rejected: int = Field(ge=0)
    rejects: FileRecord | None = None
    environment: dict[str, Any] = Field(
        default_factory=dict, description="Engine, versions, hardware; no part of the manifest."
    )


def commit_name(unit: int) -> str:
    """Name of a unit's commit record."""
    return f"{COMMITS_FOLDER}/{unit:06d}.json"


def committed_units(store: Store) -> set[int]:
    """Units that are done, from the names alone: no record is opened."""
    stems = (name.removesuffix(".json") for name in store.names(COMMITS_FOLDER) if name.endswith(".json"))
    return {int(stem) for stem in stems if stem.isdigit()}


def read_commit(store: Store, unit: int) -> CommitRecord:
    """The record of a unit. Raises `CommitDamaged`, or `FileNotFoundError` where the unit is not done."""
    name = commit_name(unit)
    record = parse_document(store.read(name), model=CommitRecord, where=name, error=CommitDamaged)
    if record.unit != unit:
        raise CommitDamaged(f"{name}: unit", found=record.unit, wanted=unit)
    return record


def commit_unit(
    store: Store,
    unit: int,
    *,
    rows: Sequence[CachedRow],
    rejects: Sequence[Reject],
    header: DatasetHeader,
    environment: Mapping[str, Any],
) -> CommitRecord:
    """Write the unit's shard and rejects, then its record if there is none yet; the record that won.

    Raises `StorageFull`; what was committed before stays good.
    """
    shard, shard_bytes = _file(SHARDS_FOLDER, unit, "parquet", write_shard(rows, header=header))
    store.put(shard.name, shard_bytes)
    rejected: FileRecord | None = None
    if rejects:
        rejected, reject_bytes = _file(REJECTS_FOLDER, unit, "jsonl", _reject_lines(rejects))
        store.put(rejected.name, reject_bytes)
    record = CommitRecord(
        unit=unit,
        shard=shard,
        rows=len(rows),
        tokens=sum(row.token_ids.size for row in rows),
        targets=sum(row.targets.positions for row in rows),
        rejected=len(rejects),
        rejects=rejected,
        environment=dict(environment),
    )
    if store.create(commit_name(unit), (record.model_dump_json(indent=2) + "\n").encode()):
        return record
    winner = read_commit(store, unit)
    kept = {file.name for file in (winner.shard, winner.rejects) if file}
    for file in (record.shard, record.rejects):
        if file and file.name not in kept:
            store.delete(file.name)
    return winner


def file_record(name: str, data: bytes) -> FileRecord:
    """Size and digest of a file's bytes under its name."""
    return FileRecord(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _file(folder: str, unit: int, ending: str, data: bytes) -> tuple[FileRecord, bytes]:
    digest = hashlib.sha256(data).hexdigest()
    return file_record(f"{folder}/{unit:06d}-{digest[:12]}.{ending}", data), data


def _reject_lines(rejects: Sequence[Reject]) -> bytes:
    return "".join(json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects).encode()
