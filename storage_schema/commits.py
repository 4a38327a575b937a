"""Commit records: a unit is done if, and only if, its record exists.

A worker writes its shard under a name that contains the digest, then creates `commits/000000.json` only if absent.
The first record of a unit wins. A later attempt reads that record and deletes its own files. Readers ignore files that
no record names, and sealing removes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pydantic import Field

from coldstill.common.models import FrozenModel, parse_document

from .errors import CommitDamaged
from .faithfulness import sample_to_bytes, take_sample
from .header import DatasetHeader
from .media import count_now_and_then, place_media, put_media, stored_media
from .rows import CachedRow
from .shard import write_shard
from .store import Store
from .verified_files import MAX_COUNT, SHARDS_FOLDER, FileRecord, file_record, unusable_files

COMMITS_FOLDER = "commits"
REJECTS_FOLDER = "rejects"
FAITHFULNESS_FOLDER = "faithfulness"
"""The units' shares of the faithfulness sample, until sealing joins them into one file."""
_READERS = 16
"""An object store responds in 30 ms: read one at a time, 100,000 commit records would take 50 minutes."""


class Reject(NamedTuple):
    """A source row that could not be used, with the reason."""

    source_row: int
    sample_id: str
    reason: str
    detail: str


class CommitRecord(FrozenModel):
    """The files and counts of a unit that is done."""

    unit: int = Field(ge=0, le=MAX_COUNT)
    shard: FileRecord
    rows: int = Field(ge=0, le=MAX_COUNT)
    tokens: int = Field(ge=0, le=MAX_COUNT)
    targets: int = Field(ge=0, le=MAX_COUNT)
    rejected: int = Field(ge=0, le=MAX_COUNT)
    rejects: FileRecord | None = None
    faithfulness: FileRecord | None = Field(default=None, description="The unit's share of the faithfulness sample.")
    media: tuple[FileRecord, ...] = Field(
        default=(), description="Files in `media/` that the rows refer to; several units may name the same one."
    )
    environment: dict[str, Any] = Field(
        default_factory=dict, description="Engine, versions and hardware; not in the manifest."
    )

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """The files that belong to this unit alone: media files may belong to other units too."""
        return tuple(file for file in (self.shard, self.rejects, self.faithfulness) if file)

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def commit_name(unit: int) -> str:
    """The file name of a unit's commit record."""
    return f"{COMMITS_FOLDER}/{unit:06d}.json"


def committed_units(store: Store) -> set[int]:
    """The units that are done, by file name: no record is opened."""
    stems = (name.removesuffix(".json") for name in store.names(COMMITS_FOLDER) if name.endswith(".json"))
    return {int(stem) for stem in stems if stem.isascii() and stem.isdigit() and f"{int(stem):06d}" == stem}


def read_commit(store: Store, unit: int) -> CommitRecord:
    """The record of a unit. Raises `CommitDamaged`, or `FileNotFoundError` for a unit that is not done."""
    name = commit_name(unit)
    record = parse_document(store.read(name), model=CommitRecord, where=name, error=CommitDamaged)
    if record.unit != unit:
        raise CommitDamaged(f"{name}: unit", found=record.unit, wanted=unit)
    return record


def read_commits(
    store: Store, units: Iterable[int], *, on_commit: Callable[[CommitRecord], None] | None = None
) -> list[CommitRecord]:
    """The records of these units, in order. A damaged record is deleted and left out: its unit counts as not done.

    Each record is passed to `on_commit`. Raises `StorageFailed`.
    """

    def read(unit: int) -> CommitRecord | None:
        if (commit := _record_of(store, unit)) is None:
            store.delete(commit_name(unit))
        return commit

    commits = []
    with ThreadPoolExecutor(_READERS) as readers:
        futures = [readers.submit(read, unit) for unit in units]
        try:
            for future in futures:
                if (commit := future.result()) is not None:
                    commits.append(commit)
                    if on_commit:
                        on_commit(commit)
        except BaseException:
            readers.shutdown(cancel_futures=True)  # Ctrl-C would wait for all of them
            raise
    return commits


def discard_unusable(store: Store, commits: Sequence[CommitRecord], *, deep: bool = False) -> list[int]:
    """Delete the records of units one of whose files is gone or damaged. Returns these units: they are not done.

    `deep`: see `unusable_files`. A record is deleted only if it is still the one in `commits`: another worker may have
    committed the unit again. No store deletes on a condition, so a newer record may still be lost. Then the unit is
    made once more, and no row is lost: the files of a sealed dataset are those that its manifest names.
    """
    files = dict.fromkeys(file for commit in commits for file in (*commit.files, *commit.media))
    unusable = unusable_files(store, files, deep=deep)
    lost = [
        commit for commit in commits if not unusable.isdisjoint(file.name for file in (*commit.files, *commit.media))
    ]
    for commit in lost:
        if _record_of(store, commit.unit) in (commit, None):
            store.delete(commit_name(commit.unit))
    return [commit.unit for commit in lost]


def _record_of(store: Store, unit: int) -> CommitRecord | None:
    """The record of a unit; None if it is absent or damaged."""
    try:
        return read_commit(store, unit)
    except (CommitDamaged, FileNotFoundError):
        return None


def commit_unit(
    store: Store,
    unit: int,
    *,
    rows: Sequence[CachedRow],
    rejects: Sequence[Reject],
    header: DatasetHeader,
    environment: Mapping[str, Any],
    faithful_positions: int = 0,
) -> CommitRecord:
    """Writes the unit's media, its shard, its rejects and `faithful_positions` of the faithfulness sample, then its
    record unless one exists. Returns the record that won.

    Media of more than `about.media_in_row_bytes` become files. A row may refer to a file that is there already.

    Raises `InvalidRow`, `InvalidTargets`, `ShardTooLarge`, `TooManyMedia`, `FileMissing`, `FileDamaged`,
    `StorageFailed`; earlier commits are unaffected.
    """
    sample = take_sample(rows, unit=unit, count=faithful_positions)
    rows, files = place_media(rows, in_row_bytes=header.about.media_in_row_bytes)
    shard = write_shard(rows, header=header)  # checks all rows before any file is written
    if files:
        count_now_and_then(store, unit)
    return commit_files(
        store,
        unit,
        shard=shard,
        media=stored_media(store, rows, written=put_media(store, files)),
        rejects=_reject_lines(rejects) if rejects else None,
        faithfulness=sample_to_bytes(sample) if sample else None,
        rows=len(rows),
        tokens=sum(row.token_ids.size for row in rows),
        targets=sum(row.targets.positions for row in rows),
        rejected=len(rejects),
        environment=environment,
    )


def commit_files(
    store: Store,
    unit: int,
    *,
    shard: bytes,
    rejects: bytes | None = None,
    faithfulness: bytes | None = None,
    media: tuple[FileRecord, ...] = (),
    rows: int,
    tokens: int,
    targets: int,
    rejected: int = 0,
    environment: Mapping[str, Any],
) -> CommitRecord:
    """Commits a unit whose files are encoded already: their bytes, and the counts of their content.

    `media`: the records of the media files that its rows refer to, which are written already.
    """
    files: dict[str, FileRecord | None] = dict.fromkeys(("shard", "rejects", "faithfulness"))
    for field, folder, ending, data in (
        ("shard", SHARDS_FOLDER, "parquet", shard),
        ("rejects", REJECTS_FOLDER, "jsonl", rejects),
        ("faithfulness", FAITHFULNESS_FOLDER, "parquet", faithfulness),
    ):
        if data is not None:
            files[field] = put_unit_file(store, unit, data, folder=folder, ending=ending)
    assert files["shard"] is not None
    record = CommitRecord(
        unit=unit,
        shard=files["shard"],
        rejects=files["rejects"],
        faithfulness=files["faithfulness"],
        media=media,
        rows=rows,
        tokens=tokens,
        targets=targets,
        rejected=rejected,
        environment=dict(environment),
    )
    if store.create(commit_name(unit), record.to_bytes()):
        return record
    if (winner := _record_of(store, unit)) is None:  # damaged, or deleted since: this attempt replaces it
        store.put(commit_name(unit), record.to_bytes())
        return record
    kept = {file.name for file in winner.files}
    for file in record.files:
        if file.name not in kept:
            store.delete(file.name)
    return winner


def put_unit_file(store: Store, unit: int, data: bytes, *, folder: str, ending: str) -> FileRecord:
    """Writes a file of a unit under a name that holds its digest. Raises `StorageFailed`."""
    name = f"{folder}/{unit:06d}-{hashlib.sha256(data).hexdigest()[:12]}.{ending}"
    store.put(name, data)
    return file_record(name, data)


def _reject_lines(rejects: Sequence[Reject]) -> bytes:
    return "".join(json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects).encode()
