"""The laws: after each kill, no file is half written under its final name; at the end, no row is lost or doubled."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.cluster.attempts import ATTEMPTS_FOLDER
from coldstill.pipeline.driver.lease import LEASE_NAME
from coldstill.pipeline.driver.status import PROGRESS_FOLDER
from coldstill.storage_schema.commits import (
    COMMITS_FOLDER,
    FAITHFULNESS_FOLDER,
    REJECTS_FOLDER,
    commit_name,
    committed_units,
    read_commit,
)
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, sample_from_bytes
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, read_manifest
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import SHARDS_FOLDER, FileRecord
from coldstill.tools.verify import verify

_DIGEST_LETTERS = 12
_READERS: dict[str, Callable[[bytes], object]] = {
    HEADER_NAME: lambda data: DatasetHeader.from_bytes(data, where=HEADER_NAME),
    PLAN_NAME: lambda data: plan_from_bytes(data, where=PLAN_NAME),
    FAITHFULNESS_NAME: lambda data: sample_from_bytes(data, where=FAITHFULNESS_NAME),
    MANIFEST_NAME: json.loads,
    LEASE_NAME: json.loads,
}
_TOLERANCE = 0.02
"""Nats between two values of one entry, of `order: fast`: the noise, and a step of the codec's grid for each."""


def half_written(store: Store) -> list[str]:
    """The errors of files under their final names. Other processes may write at the same time."""
    return [*_documents(store), *_files_by_digest(store), *_commits(store)]


def _documents(store: Store) -> Iterator[str]:
    records = [f"{folder}/{name}" for folder in (ATTEMPTS_FOLDER, PROGRESS_FOLDER) for name in store.names(folder)]
    for name in (*_READERS, *records):
        try:
            _READERS.get(name, json.loads)(store.read(name))
        except FileNotFoundError:
            continue
        except (ColdstillError, ValueError) as error:
            yield f"{name}: {error}"
    if store.exists(MANIFEST_NAME):
        manifest, _ = read_manifest(store)
        yield from _named(store, [*(shard.file for shard in manifest.shards), *manifest.files], by=MANIFEST_NAME)


def _files_by_digest(store: Store) -> Iterator[str]:
    """Also checks files that no record names yet: each name holds the digest of the content."""
    for folder in (SHARDS_FOLDER, REJECTS_FOLDER, FAITHFULNESS_FOLDER):
        for name in store.names(folder):
            try:
                data = store.read(f"{folder}/{name}")
            except FileNotFoundError:
                continue  # the process that lost a race has deleted it
            digest = name.partition(".")[0].rpartition("-")[2]
            if hashlib.sha256(data).hexdigest()[:_DIGEST_LETTERS] != digest:
                yield f"{folder}/{name}: the digest in its name is another one"


def _commits(store: Store) -> Iterator[str]:
    names = {f"{COMMITS_FOLDER}/{name}" for name in store.names(COMMITS_FOLDER)}
    done = committed_units(store)  # after the names: other processes may commit meanwhile
    if strange := names - {commit_name(unit) for unit in done}:
        yield f"{COMMITS_FOLDER}: {sorted(strange)} are no records"
    for unit in sorted(done):
        try:
            files = read_commit(store, unit).files
        except ColdstillError as error:
            yield str(error)
        else:
            yield from _named(store, files, by=f"the record of unit {unit}")


def _named(store: Store, files: Sequence[FileRecord], *, by: str) -> Iterator[str]:
    for file in files:
        try:
            data = store.read(file.name)
        except FileNotFoundError:
            # Sealing merges the shares of the faithfulness sample into one file and deletes them.
            if not (file.name.startswith(FAITHFULNESS_FOLDER) and store.exists(MANIFEST_NAME)):
                yield f"{file.name}: named by {by}, and absent"
            continue
        if (len(data), hashlib.sha256(data).hexdigest()) != (file.bytes, file.sha256):
            yield f"{file.name}: not the bytes that {by} names"


class Comparison(NamedTuple):
    """A finished capture compared with an unbroken one: rows and rejects `lost` and `doubled`, and other errors."""

    lost: int
    doubled: int
    wrong: list[str]


def compare(url: str, unbroken_url: str) -> Comparison:
    """Compare a capture that was killed with one that was not."""
    dataset, unbroken = open_dataset(url), open_dataset(unbroken_url)
    is_exact = dataset.header.order == "exact"
    got, wanted = _counted(dataset), _counted(unbroken)
    wrong = [str(finding) for finding in verify(url, deep=True, progress=False)]
    if is_exact:
        wrong += _left_over(dataset)
        if dataset.dataset_id != unbroken.dataset_id:
            wrong.append(f"dataset id {dataset.dataset_id}, unbroken {unbroken.dataset_id}")
    if not is_exact and got == wanted:
        pairs = zip(dataset.rows(), unbroken.rows(), strict=True)
        wrong += [f"row {mine.sample_id!r}: {what}" for mine, other in pairs for what in _differences(mine, other)]
    return Comparison(lost=(wanted - got).total(), doubled=(got - wanted).total(), wrong=wrong)


def _left_over(dataset: Dataset) -> Iterator[str]:
    """Files that no record names. With `order: fast` a late worker that is killed after sealing may leave some."""
    named = {shard.file.name for shard in dataset.shards} | {file.name for file in dataset.manifest.files}
    for folder in (SHARDS_FOLDER, REJECTS_FOLDER):
        for name in dataset.store.names(folder):
            if f"{folder}/{name}" not in named:
                yield f"{folder}/{name}: left over"


def _counted(dataset: Dataset) -> Counter[str]:
    """Count each row and each reject."""
    rows = Counter(f"row {row.sample_id}" for row in dataset.rows())
    files = (file.name for file in dataset.manifest.files if file.name.startswith(REJECTS_FOLDER))
    lines = (line.decode() for name in files for line in dataset.store.read(name).splitlines())
    return rows + Counter(f"reject {line}" for line in lines)


def _differences(mine: CachedRow, other: CachedRow) -> Iterator[str]:
    """The differences of two rows of one sample, captured with `order: fast`."""
    for field in ("token_ids", "target_spans"):
        if not np.array_equal(getattr(mine, field), getattr(other, field)):
            yield f"other {field}"
    if not np.array_equal(mine.targets.counts, other.targets.counts):
        yield "other counts"
    elif (far := _farthest(mine, other)) > _TOLERANCE:
        yield f"a log-prob differs by {far:.3f}"


def _farthest(mine: CachedRow, other: CachedRow) -> float:
    """The largest difference of an entry's log-prob; infinite where other ids are kept."""
    farthest = 0.0
    for position, count in enumerate(mine.targets.counts):
        first, second = (
            dict(zip(row.targets.ids[position, :count].tolist(), row.targets.logprobs[position, :count], strict=True))
            for row in (mine, other)
        )
        if first.keys() != second.keys():
            return float("inf")
        farthest = max([farthest, *(abs(float(first[token] - second[token])) for token in first)])
    return farthest
