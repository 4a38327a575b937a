"""A sealed dataset from one store to another: a dataset and a store in, a second copy out, whose id is the same.

Every file is verified as it passes, in blocks, and gets its name when it is right. `manifest.json` comes last, so what
is half copied is never a sealed dataset. What the destination holds already, right in size and digest, stays.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, Never

from tqdm import tqdm

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.commits import COMMITS_FOLDER
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import CommitDamaged, FileDamaged, StorageFull
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME, dataset_id
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import FileRecord, copy_file

CARD_NAME = "README.md"
CARD_FILES = (CARD_NAME, "card/stats.png")
"""The dataset card and its picture: no part of the manifest, so that a card can be mended under the same id."""

MAX_CARD_BYTES = 16 << 20
THREADS = 4


class AnotherDataset(ColdstillError):
    """The destination holds another dataset, or a capture that has not ended."""


class Transferred(NamedTuple):
    """What a push or a pull did: the dataset's id, the files and bytes that moved, and the files that were there."""

    dataset_id: str
    files: int
    bytes: int
    already_there: int


def dataset_files(dataset: Dataset) -> list[FileRecord]:
    """All files that the manifest names."""
    return [*dataset.manifest.files, *(shard.file for shard in dataset.shards)]


def copy_dataset(dataset: Dataset, destination: Store, *, progress: bool) -> Transferred:
    """Make `destination` a copy of `dataset`; one that goes from a local folder to a remote store is verified already.

    Raises `AnotherDataset`, `FileMissing`, `FileDamaged` (for a shard `ShardMissing`, `ShardDamaged`), `StorageFull`
    and the other kinds of `StorageFailed`.
    """
    if destination.is_local:
        destination.require_writable()
    require_same_dataset(dataset, destination)
    files = dataset_files(dataset)
    _require_room(files, destination)
    with tqdm(
        total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc="copy", disable=not progress
    ) as bar:
        moved = _in_threads(files, lambda file, on_block: copy_file(dataset.store, file, destination, on_block), bar)
    for name, data in read_card(dataset.store).items():
        destination.put(name, data)
    destination.put(MANIFEST_NAME, manifest_bytes(dataset))
    if destination.is_local:  # on other stores nothing is written there
        destination.delete_folder(RUN_FOLDER)
    return Transferred(
        dataset_id=dataset.dataset_id,
        files=sum(moved),
        bytes=sum(file.bytes for file, was_moved in zip(files, moved, strict=True) if was_moved),
        already_there=len(files) - sum(moved),
    )


def require_same_dataset(dataset: Dataset, destination: Store) -> None:
    """Raise `AnotherDataset` unless the destination is empty, or a copy of this dataset, whole or not."""
    found = ""
    if (manifest := _read_if_there(destination, MANIFEST_NAME)) is not None:
        if dataset_id(manifest) != dataset.dataset_id:
            found = f"a sealed dataset with the id {dataset_id(manifest)}"
    elif destination.names(COMMITS_FOLDER):
        found = "a capture that has not ended"
    elif (header := _read_if_there(destination, HEADER_NAME)) is not None and header != dataset.header.to_bytes():
        found = f"another {HEADER_NAME}"
    if found:
        raise AnotherDataset(
            destination.url,
            found=found,
            wanted=f"nothing, or a copy of {dataset.dataset_id}",
            fix="choose another destination, or remove what is there",
        )


def manifest_bytes(dataset: Dataset) -> bytes:
    """The manifest file. Raises `CommitDamaged` where it is no longer the one that was opened."""
    data = dataset.store.read(MANIFEST_NAME)
    if dataset_id(data) != dataset.dataset_id:
        raise CommitDamaged(
            f"{dataset.store.url}/{MANIFEST_NAME}",
            found=f"id {dataset_id(data)}",
            wanted=f"id {dataset.dataset_id}, as at the start",
            fix="start again: the dataset was replaced meanwhile",
        )
    return data


def read_card(store: Store) -> dict[str, bytes]:
    """The files of the dataset card that are there. Raises `FileDamaged` where one is too large to be one."""
    card = {}
    for name in CARD_FILES:
        try:
            if (size := store.size(name)) > MAX_CARD_BYTES:
                raise FileDamaged(f"{store.url}/{name}", found=f"{size} bytes", wanted=f"at most {MAX_CARD_BYTES}")
            card[name] = store.read(name)
        except FileNotFoundError:
            continue
    return card


def _in_threads(
    files: list[FileRecord], work: Callable[[FileRecord, Callable[[int], None]], bool], bar: tqdm[Never]
) -> list[bool]:
    """The work on each file, some at once; the first error ends the others at their next block."""
    stopped = threading.Event()

    def on_block(size: int) -> None:
        if stopped.is_set():
            raise _Stopped
        bar.update(size)

    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(work, file, on_block) for file in files]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopped.set()
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class _Stopped(Exception):
    """Another file failed."""


def _require_room(files: Iterable[FileRecord], destination: Store) -> None:
    if not destination.is_local:
        return
    root = Path(destination.root)
    needed = sum(file.bytes for file in files if not Path(destination.path(file.name)).is_file())
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise StorageFull(
            destination.url,
            found=f"{free:,} bytes free",
            wanted=f"room for {needed:,} bytes",
            fix="free some room, or choose a folder on another disk",
        )


def _read_if_there(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None
