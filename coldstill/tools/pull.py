"""`coldstill pull`, and the verified copy of a sealed dataset between stores.

Each file is verified block by block while it is copied, and gets its final name only when its digest is right.
`manifest.json` is written last, so an unfinished copy is never a sealed dataset. Files that the destination already
holds, with the right size and digest, are not copied again: re-run the same command to resume.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, Never

from tqdm import tqdm

from coldstill.storage_schema.commits import COMMITS_FOLDER
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import CommitDamaged, FileDamaged, StorageFull, UnsupportedStore
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, sample_from_bytes
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME, dataset_id
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import FileRecord, copy_file

from .errors import AnotherDataset
from .verify import foreign_file

CARD_NAME = "README.md"
CARD_FILES = (CARD_NAME, "card/stats.png")
"""The dataset card and its plot. The manifest does not list them, so that a card can be edited under the same id."""

MAX_CARD_BYTES = 16 << 20
THREADS = 4


class TransferResult(NamedTuple):
    """What a push or a pull did: the dataset's id, the files and bytes that were copied, the files already there."""

    dataset_id: str
    files: int
    bytes: int
    already_there: int


def pull(source: str | Path, folder: str | Path, *, progress: bool = True) -> TransferResult:
    """Copy the sealed dataset at `source`, a path or any URL, into a local folder, and verify every file.

    A second pull into the same folder replaces the files that are missing or damaged.

    Raises `DatasetNotFound`, `DatasetNotSealed`, `FileMissing`, `FileDamaged`, `ForeignFile`, `AnotherDataset`,
    `StoreNotFound`, `StorageFull`, `StorageFailed`, `UnsupportedStore`.
    """
    if "://" in str(folder):
        raise UnsupportedStore(
            str(folder), found="a URL", wanted="a local folder", fix="use `coldstill push` to copy to another store"
        )
    return copy_dataset(open_dataset(source), Store(folder), progress=progress)


def copy_dataset(dataset: Dataset, destination: Store, *, progress: bool) -> TransferResult:
    """Make `destination` a copy of `dataset`.

    Raises `AnotherDataset`, `ForeignFile`, `FileMissing`, `FileDamaged` (for a shard `ShardMissing`, `ShardDamaged`),
    `StorageFull` and the other kinds of `StorageFailed`.
    """
    require_own_names(dataset)
    if destination.is_local:
        destination.require_writable()
    require_same_dataset(dataset, destination)
    files = dataset_files(dataset)
    _require_room(files, destination)
    with tqdm(
        total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc="copy", disable=not progress
    ) as bar:
        copied = _in_threads(files, lambda file, on_block: copy_file(dataset.store, file, destination, on_block), bar)
    for name, data in read_unlisted(dataset).items():
        destination.put(name, data)
    destination.put(MANIFEST_NAME, manifest_bytes(dataset))
    if destination.is_local:  # other stores have no such folder
        destination.delete_folder(RUN_FOLDER)
    return TransferResult(
        dataset_id=dataset.dataset_id,
        files=sum(copied),
        bytes=sum(file.bytes for file, was_copied in zip(files, copied, strict=True) if was_copied),
        already_there=len(files) - sum(copied),
    )


def require_own_names(dataset: Dataset) -> None:
    """Raise `ForeignFile` if the manifest lists a name that the format does not have: a copy would write it."""
    if names := dataset.manifest.foreign_names:
        raise foreign_file(names[0])


def dataset_files(dataset: Dataset) -> list[FileRecord]:
    """All files that the manifest lists."""
    return [*dataset.manifest.files, *(shard.file for shard in dataset.shards)]


def require_same_dataset(dataset: Dataset, destination: Store) -> None:
    """Raise `AnotherDataset` unless the destination is empty, or a finished or unfinished copy of this dataset."""
    found = ""
    if (manifest := _read_if_there(destination, MANIFEST_NAME)) is not None:
        if dataset_id(manifest) != dataset.dataset_id:
            found = f"a sealed dataset with the id {dataset_id(manifest)}"
    elif destination.names(COMMITS_FOLDER):
        found = "a capture that has not finished"
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
    """The manifest file. Raises `CommitDamaged` if it changed after the dataset was opened."""
    data = dataset.store.read(MANIFEST_NAME)
    if dataset_id(data) != dataset.dataset_id:
        raise CommitDamaged(
            f"{dataset.store.url}/{MANIFEST_NAME}",
            found=f"id {dataset_id(data)}",
            wanted=f"id {dataset.dataset_id}, as at the start",
            fix="re-run the command: the dataset was replaced meanwhile",
        )
    return data


def read_card(store: Store) -> dict[str, bytes]:
    """Those files of the dataset card that exist. Raises `FileDamaged` for one above `MAX_CARD_BYTES`."""
    card = {}
    for name in CARD_FILES:
        try:
            if (size := store.size(name)) > MAX_CARD_BYTES:
                raise FileDamaged(f"{store.url}/{name}", found=f"{size} bytes", wanted=f"at most {MAX_CARD_BYTES}")
            card[name] = store.read(name)
        except FileNotFoundError:
            continue
    return card


def read_unlisted(dataset: Dataset) -> dict[str, bytes]:
    """The files of a dataset that its manifest does not list: its card, and in format 2 the faithfulness sample.

    Raises `FileDamaged`, for a sample after it was checked.
    """
    unlisted = read_card(dataset.store)
    if dataset.manifest.format_version > 1 and (sample := dataset.faithfulness_bytes()):
        sample_from_bytes(sample, where=f"{dataset.store.url}/{FAITHFULNESS_NAME}")
        unlisted[FAITHFULNESS_NAME] = sample
    return unlisted


def _in_threads(
    files: list[FileRecord], work: Callable[[FileRecord, Callable[[int], None]], bool], bar: tqdm[Never]
) -> list[bool]:
    """The results of `work` on each file, `THREADS` at a time. The first error stops the others at their next block."""
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
    """The copy of another file failed."""


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
            wanted=f"{needed:,} bytes free",
            fix="free disk space, or choose a folder on another disk",
        )


def _read_if_there(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None
