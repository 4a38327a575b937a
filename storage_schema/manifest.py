"""The manifest: the list of all files of a sealed dataset. Its sha256 is the dataset's id.

`seal` writes it last, and only when every planned unit has a commit record. It holds no time, host or path, so that
equal captures have equal ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from itertools import islice, pairwise
from pathlib import Path

from pydantic import Field, model_validator

from coldstill.common.files import did_you_mean
from coldstill.common.models import MAX_DOCUMENT_BYTES, FrozenModel, parse_document
from coldstill.common.visible import visible

from .commits import (
    COMMITS_FOLDER,
    FAITHFULNESS_FOLDER,
    REJECTS_FOLDER,
    CommitRecord,
    commit_name,
    committed_units,
    discard_unusable,
    read_commits,
)
from .errors import (
    CommitDamaged,
    DatasetNotFound,
    DatasetNotSealed,
    FileDamaged,
    FileMissing,
    TooManyMedia,
    UnitsMissing,
)
from .faithfulness import FAITHFULNESS_NAME, ExactPosition, sample_from_bytes, sample_to_bytes
from .header import FORMAT_VERSION, HEADER_NAME, READ_VERSIONS, DatasetHeader
from .media import is_own_name, require_room
from .plan import PLAN_NAME, plan_from_bytes
from .rows import MEDIA_FOLDER, is_media_path
from .store import RUN_FOLDER, Store
from .store.local import what_lies_at
from .tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER
from .verified_files import MAX_COUNT, SHARDS_FOLDER, FileRecord, file_record, read_file

MANIFEST_NAME = "manifest.json"
MAX_SEALED_UNITS = 100_000
"""A unit with rejects takes 492 bytes of the manifest: this many units fit `MAX_DOCUMENT_BYTES`."""

_RUN_NAME, _RUN_PAGE = "run.json", "report.html"
"""Files that `coldstill.trainer`, which this room does not import, writes into the output of a training."""


_SINGLE_FILES = (HEADER_NAME, PLAN_NAME, FAITHFULNESS_NAME)
_ENDINGS = {SHARDS_FOLDER: ".parquet", REJECTS_FOLDER: ".jsonl"}


class ShardRecord(FrozenModel):
    """A shard as the manifest lists it."""

    unit: int = Field(ge=0, le=MAX_COUNT)
    file: FileRecord
    rows: int = Field(ge=0, le=MAX_COUNT)
    tokens: int = Field(ge=0, le=MAX_COUNT)
    targets: int = Field(ge=0, le=MAX_COUNT)
    rejected: int = Field(ge=0, le=MAX_COUNT)


class Manifest(FrozenModel):
    """All files of a sealed dataset with their sizes and digests."""

    format_version: int = FORMAT_VERSION
    rows: int = Field(ge=0, le=MAX_COUNT)
    tokens: int = Field(ge=0, le=MAX_COUNT)
    targets: int = Field(ge=0, le=MAX_COUNT)
    rejected: int = Field(ge=0, le=MAX_COUNT)
    shards: tuple[ShardRecord, ...] = Field(description="By unit number.")
    files: tuple[FileRecord, ...] = Field(
        description="Header, plan, tokenizer, rejects, media; in format 1 the faithfulness sample too."
    )
    derived_from: tuple[str, ...] = Field(
        default=(), description="Ids of the datasets that this one was derived from by merge, split, subset or upgrade."
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        if self.format_version not in READ_VERSIONS:
            wanted = " and ".join(map(str, READ_VERSIONS))
            raise ValueError(f"format_version {self.format_version}, this release reads {wanted}")
        for name in ("rows", "tokens", "targets", "rejected"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if getattr(self, name) != total:
                raise ValueError(f"{name} {getattr(self, name)}, its shards have {total}")
        names = [file.name for file in (*(shard.file for shard in self.shards), *self.files)]
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        units = [shard.unit for shard in self.shards]
        if any(later <= unit for unit, later in pairwise(units)):
            raise ValueError("the shards are not in the order of their units, or two are of one unit")
        return self

    @property
    def foreign_names(self) -> tuple[str, ...]:
        """Names in the manifest that the format does not have. Readers ignore these files, and nothing copies them.

        Of two names that differ only in case, the later one: on some systems they would be one file.
        """
        foreign, taken = [], set()
        for file in (*(shard.file for shard in self.shards), *self.files):
            if not is_dataset_file(file.name) or file.name.lower() in taken:
                foreign.append(file.name)
            taken.add(file.name.lower())
        return tuple(foreign)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def is_dataset_file(name: str) -> bool:
    """Whether a manifest's file can have this name. A stranger chooses the names, and a copy writes them."""
    folder, _, last = name.rpartition("/")
    if folder == TOKENIZER_FOLDER:
        return last in TOKENIZER_FILES
    if folder in _ENDINGS:
        return last.endswith(_ENDINGS[folder])
    return name in _SINGLE_FILES or is_media_path(name)


def dataset_id(manifest_bytes: bytes) -> str:
    """The id of a dataset: sha256 of its manifest file."""
    return hashlib.sha256(manifest_bytes).hexdigest()


def seal(
    store: Store, *, derived_from: tuple[str, ...] = (), on_commit: Callable[[CommitRecord], None] | None = None
) -> Manifest:
    """Writes the manifest of a finished capture and removes files that no commit record names. Returns the manifest.

    Each commit record is read once and passed to `on_commit`. For a dataset that is sealed already, no record is read.
    Raises `UnitsMissing` while a planned unit is not committed, or has lost a file: that unit is then made again.
    Raises `TooManyMedia` if the manifest cannot list all media files.
    """
    if store.exists(MANIFEST_NAME):
        _remove_what_readers_ignore(store)
        return read_manifest(store)[0]
    planned = len(plan_from_bytes(_require(store, PLAN_NAME), where=PLAN_NAME))
    done = committed_units(store)
    missing = [unit for unit in range(planned) if unit not in done]
    if missing:
        raise UnitsMissing(
            f"{store.url}: units",
            found=f"{len(missing)} of {planned} not committed, the first is {missing[0]}",
            wanted="a commit record for each planned unit",
            fix="re-run the same command to resume: it adds the missing units and seals",
        )
    commits = _whole_commits(store, planned, on_commit)
    # Two attempts with equal bytes share one shard file, and the losing attempt deletes only names that the winner's
    # record does not hold. So each file that a record names exists, and every other file is left over.
    named = {file.name for commit in commits for file in commit.files}
    for folder in (SHARDS_FOLDER, REJECTS_FOLDER, FAITHFULNESS_FOLDER):
        for name in store.names(folder):
            if f"{folder}/{name}" not in named:
                store.delete(f"{folder}/{name}")
    media = _media(store, commits)
    _join_samples(store, commits)
    # Equal shards of two machines can have samples that differ in the last bits, so format 2 does not list the sample.
    header = DatasetHeader.from_bytes(_require(store, HEADER_NAME), where=HEADER_NAME)
    has_listed_sample = header.format_version == 1 and store.exists(FAITHFULNESS_NAME)
    single = (HEADER_NAME, PLAN_NAME, *([FAITHFULNESS_NAME] if has_listed_sample else []))
    names = [f"{TOKENIZER_FOLDER}/{name}" for name in store.names(TOKENIZER_FOLDER)]
    listed = [name for name in names if is_dataset_file(name)]
    manifest = Manifest(
        format_version=header.format_version,
        rows=sum(commit.rows for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        targets=sum(commit.targets for commit in commits),
        rejected=sum(commit.rejected for commit in commits),
        shards=tuple(_shard_record(commit) for commit in commits),
        files=(
            *(file_record(name, _require(store, name)) for name in (*single, *listed)),
            *media,
            *(commit.rejects for commit in commits if commit.rejects),
        ),
        derived_from=derived_from,
    )
    data = manifest.to_bytes()
    if len(data) > MAX_DOCUMENT_BYTES:
        found = f"{len(data):,} bytes: {len(commits):,} units, {len(media):,} media files"
        raise TooManyMedia(f"{store.url}/{MANIFEST_NAME}", found=found, wanted=f"at most {MAX_DOCUMENT_BYTES:,}")
    store.create(MANIFEST_NAME, data)
    _remove_what_readers_ignore(store)
    return read_manifest(store)[0]


def _media(store: Store, commits: list[CommitRecord]) -> list[FileRecord]:
    """The media files that the commit records name, by name. Own files that none names are removed.

    A file is not read again: its record says what was written, and `_whole_commits` compared its size.
    """
    named = {file.name: file for commit in commits for file in commit.media}
    require_room(units=len(commits), media=len(named), where=store.url)
    # Records of earlier releases name no media. A dataset that one of them started keeps all its files.
    keeps_all = any("media" not in commit.model_fields_set for commit in commits)
    for last in store.names(MEDIA_FOLDER):
        name = f"{MEDIA_FOLDER}/{last}"
        if name in named or not is_dataset_file(name):
            continue
        if keeps_all:
            named[name] = file_record(name, _require(store, name))
        elif is_own_name(last):
            store.delete(name)
    return [named[name] for name in sorted(named)]


def _remove_what_readers_ignore(store: Store) -> None:
    for folder in (RUN_FOLDER, FAITHFULNESS_FOLDER):
        store.delete_folder(folder)


def _whole_commits(store: Store, planned: int, on_commit: Callable[[CommitRecord], None] | None) -> list[CommitRecord]:
    """The records of all units. Raises `UnitsMissing` if a file of a unit is gone or cut, or its record is damaged;
    that unit then counts as not done."""
    commits = read_commits(store, range(planned), on_commit=on_commit)
    lost = {*range(planned)} - {commit.unit for commit in commits}
    lost |= {*discard_unusable(store, commits)}
    if lost:
        raise _units_lost(store, lost)
    return commits


def _units_lost(store: Store, units: Collection[int]) -> UnitsMissing:
    return UnitsMissing(
        f"{store.url}: units",
        found=f"{len(units)} whose files are gone or damaged, the first is {min(units)}",
        wanted="all files of each committed unit",
        fix="re-run the same command to resume: it makes these units again and seals",
    )


def _join_samples(store: Store, commits: list[CommitRecord]) -> None:
    """Joins the units' shares of the faithfulness sample into one file. Raises `UnitsMissing` for a damaged share."""
    joined: list[ExactPosition] = []
    shares = [commit for commit in commits if commit.faithfulness]
    for commit in shares:
        assert commit.faithfulness is not None
        try:
            data = read_file(store, commit.faithfulness)
            joined += sample_from_bytes(data, where=commit.faithfulness.name)
        except (FileMissing, FileDamaged):
            store.delete(commit_name(commit.unit))
            raise _units_lost(store, [commit.unit]) from None
    if shares:
        store.put(FAITHFULNESS_NAME, sample_to_bytes(joined))


def _shard_record(commit: CommitRecord) -> ShardRecord:
    return ShardRecord(
        unit=commit.unit,
        file=commit.shard,
        rows=commit.rows,
        tokens=commit.tokens,
        targets=commit.targets,
        rejected=commit.rejected,
    )


def read_manifest(store: Store) -> tuple[Manifest, str]:
    """The manifest and the dataset's id. Raises `DatasetNotFound`, `DatasetNotSealed`, `CommitDamaged`."""
    try:
        data = store.read(MANIFEST_NAME, at_most=MAX_DOCUMENT_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        _raise_absent(store)
    manifest = parse_document(data, model=Manifest, where=MANIFEST_NAME, error=CommitDamaged)
    for file in (*(shard.file for shard in manifest.shards), *manifest.files):
        store.path(file.name)  # rejects a name outside the dataset before any file is opened
    return manifest, dataset_id(data)


def _require(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetNotFound(f"{store.url}: {name}", found="no such file", wanted="a dataset directory") from None


def absent(
    store: Store, *, found: str = f"neither {MANIFEST_NAME} nor {HEADER_NAME}", hint: str = ""
) -> DatasetNotFound:
    """The error that `store` holds no dataset, with what lies there and what its user may have meant."""
    fix = f"check the path: it is the `output` of `coldstill capture`{hint}"
    if store.is_local:
        words, names = what_lies_at(store.root)
        fix = did_you_mean(store.url) or fix
        found = f"{words}, {found}"
        datasets = (name for name in names if Path(store.root, name, HEADER_NAME).is_file())
        if inside := [visible(f"{store.url}/{name}") for name in islice(datasets, 3)]:
            fix = f"did you mean {' or '.join(inside)}?"
        elif {_RUN_NAME, _RUN_PAGE} <= set(names):
            fix = f"this is the output of a training: see its {_RUN_PAGE}, or give the folder to `coldstill compare`"
    return DatasetNotFound(store.url, found=found, wanted="a dataset directory", fix=fix)


def _raise_absent(store: Store) -> None:
    if not store.exists(HEADER_NAME):
        raise absent(store)
    raise DatasetNotSealed(
        store.url,
        found=f"{len(store.names(COMMITS_FOLDER))} commit records and no {MANIFEST_NAME}",
        wanted="a sealed dataset",
        fix="re-run the command that wrote it to resume: it adds the missing units and seals",
    )
