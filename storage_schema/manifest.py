"""The manifest: the sealed list of what a dataset consists of. Its own sha256 is the dataset's id.

It is written last, refuses to be while a planned unit has no commit record, and holds no time, host or path: equal
captures have equal ids.
"""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict, Field

from .commits import (
    COMMITS_FOLDER,
    REJECTS_FOLDER,
    SHARDS_FOLDER,
    FileRecord,
    committed_units,
    file_record,
    read_commit,
)
from .documents import parse_document
from .errors import CommitDamaged, DatasetNotFound, DatasetNotSealed, UnitsMissing
from .header import FORMAT_VERSION, HEADER_NAME
from .plan import PLAN_NAME, plan_from_bytes
from .store import RUN_FOLDER, Store
from .tokenizer import TOKENIZER_FOLDER

MANIFEST_NAME = "manifest.json"


class ShardRecord(BaseModel):
    """A committed shard as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: int = Field(ge=0)
    file: FileRecord
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    targets: int = Field(ge=0)
    rejected: int = Field(ge=0)


class Manifest(BaseModel):
    """All files of a sealed dataset with their sizes and digests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    targets: int = Field(ge=0)
    rejected: int = Field(ge=0)
    shards: tuple[ShardRecord, ...] = Field(description="In the order of their units.")
    files: tuple[FileRecord, ...] = Field(description="Header, plan, tokenizer and rejects.")

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def dataset_id(manifest_bytes: bytes) -> str:
    """The id of a dataset: sha256 of its manifest file."""
    return hashlib.sha256(manifest_bytes).hexdigest()


def seal(store: Store) -> Manifest:
    """Write the manifest of a finished capture and remove what no commit record names; the manifest that is there.

    Raises `UnitsMissing` while a planned unit is not committed.
    """
    if store.exists(MANIFEST_NAME):
        return read_manifest(store)[0]
    plan_bytes = _require(store, PLAN_NAME)
    planned = len(plan_from_bytes(plan_bytes, where=PLAN_NAME))
    missing = sorted(set(range(planned)) - committed_units(store))
    if missing:
        raise UnitsMissing(
            f"{store.url}: units",
            found=f"{len(missing)} of {planned} not committed, the first is {missing[0]}",
            wanted="a commit record for each planned unit",
            fix="start the same capture again: it does what is missing and seals",
        )
    commits = [read_commit(store, unit) for unit in range(planned)]
    # Two attempts with equal bytes share one shard file, and a racing loser may delete only names of its own: so what a
    # record names is there, and whatever else lies in the folders belongs to nobody.
    named = {file.name for commit in commits for file in (commit.shard, commit.rejects) if file}
    for folder in (SHARDS_FOLDER, REJECTS_FOLDER):
        for name in store.names(folder):
            if f"{folder}/{name}" not in named:
                store.delete(f"{folder}/{name}")
    tokenizer_files = [f"{TOKENIZER_FOLDER}/{name}" for name in store.names(TOKENIZER_FOLDER)]
    files = [file_record(name, _require(store, name)) for name in (HEADER_NAME, PLAN_NAME, *tokenizer_files)]
    manifest = Manifest(
        rows=sum(commit.rows for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        targets=sum(commit.targets for commit in commits),
        rejected=sum(commit.rejected for commit in commits),
        shards=tuple(
            ShardRecord(
                unit=commit.unit,
                file=commit.shard,
                rows=commit.rows,
                tokens=commit.tokens,
                targets=commit.targets,
                rejected=commit.rejected,
            )
            for commit in commits
        ),
        files=(*files, *(commit.rejects for commit in commits if commit.rejects)),
    )
    store.create(MANIFEST_NAME, manifest.to_bytes())
    store.delete_folder(RUN_FOLDER)
    return read_manifest(store)[0]


def read_manifest(store: Store) -> tuple[Manifest, str]:
    """The manifest and the dataset's id. Raises `DatasetNotFound`, `DatasetNotSealed`, `CommitDamaged`."""
    try:
        data = store.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        _raise_absent(store)
    manifest = parse_document(data, model=Manifest, where=MANIFEST_NAME, error=CommitDamaged)
    for file in (*(shard.file for shard in manifest.shards), *manifest.files):
        store.path(file.name)  # a name that leaves the dataset is refused before anything is opened
    return manifest, dataset_id(data)


def _require(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetNotFound(f"{store.url}: {name}", found="no such file", wanted="a dataset directory") from None


def _raise_absent(store: Store) -> None:
    if not store.exists(HEADER_NAME):
        raise DatasetNotFound(
            store.url,
            found=f"neither {MANIFEST_NAME} nor {HEADER_NAME}",
            wanted="a dataset directory",
            fix="check the path: it is the folder that `coldstill capture` calls `output`",
        )
    raise DatasetNotSealed(
        store.url,
        found=f"{len(store.names(COMMITS_FOLDER))} commit records and no {MANIFEST_NAME}",
        wanted="a sealed dataset",
        fix="start its capture again: it does what is missing and seals",
    )
