"""`coldstill pull`, and the verified copy of a sealed dataset between stores.

Each file is verified block by block while it is copied, and gets its final name only when its digest is right.
`manifest.json` is written last, so an unfinished copy is never a sealed dataset. Files that the destination already
holds, with the right size and digest, are not copied again: re-run the same command to resume.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from coldstill.common.progress import tqdm
from coldstill.common.retry import retrying
from coldstill.common.visible import visible
from coldstill.storage_schema.commits import COMMITS_FOLDER
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import (
    CommitDamaged,
    FileDamaged,
    StorageFull,
    UnsupportedStore,
    is_transient,
    named_errors,
)
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, sample_from_bytes
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME, dataset_id
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import FileRecord, copy_file

from .card_text import CARD_FILES, CARD_NAME, MAX_CARD_BYTES, card_taken, is_unedited
from .errors import AnotherDataset
from .verify import foreign_file

THREADS = 4
ATTEMPTS = 8
"""Calls to a store that fails temporarily. The waits between them take a minute, or as long as the store asks for."""

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class TransferResult(NamedTuple):
    """What a push or a pull did: the dataset's id, the files and bytes that were copied, the files already there."""

    dataset_id: str
    files: int
    bytes: int
    already_there: int


def pull(source: str | Path, folder: str | Path, *, progress: bool = True) -> TransferResult:
    """Copy the sealed dataset at `source`, a path or any URL, into a local folder, and verify every file.

    A second pull into the same folder replaces the files that are missing or damaged. A card in the folder that
    someone edited is kept. What fails temporarily is tried again.

    Raises `DatasetNotFound`, `DatasetNotSealed`, `FileMissing`, `FileDamaged`, `ForeignFile`, `AnotherDataset`,
    `StoreNotFound`, `StorageFull`, `StorageFailed`, `UnsupportedStore`.
    """
    if "://" in str(folder):
        raise UnsupportedStore(
            str(folder), found="a URL", wanted="a local folder", fix="use `coldstill push` to copy to another store"
        )
    return copy_dataset(retried(open_dataset, source), Store(folder), progress=progress, keep_card=True)


def copy_dataset(
    dataset: Dataset,
    destination: Store,
    *,
    progress: bool,
    keep_card: bool = False,
    replace_card: bool = False,
    make_card: Callable[[], dict[str, bytes]] | None = None,
) -> TransferResult:
    """Make `destination` a copy of `dataset`.

    A card at the destination that someone edited is kept with a warning (`keep_card`), replaced (`replace_card`), or
    `CardExists` is raised before anything is copied. `make_card` gives the files of the card where there is none yet.

    Raises `AnotherDataset`, `ForeignFile`, `FileMissing`, `FileDamaged` (for a shard `ShardMissing`, `ShardDamaged`),
    `StorageFull` and the other kinds of `StorageFailed`.
    """
    require_own_names(dataset)
    if destination.is_local:
        destination.require_writable()
    require_same_dataset(dataset, destination)
    files = dataset_files(dataset)
    _require_room(files, destination)
    unlisted = retried(read_unlisted, dataset)
    if make_card and CARD_NAME not in unlisted and _read_if_there(destination, CARD_NAME) is None:
        unlisted |= make_card()
    if not replace_card:
        unlisted = _without_taken_card(unlisted, destination, keep=keep_card)
    with tqdm(
        total=sum(file.bytes for file in files), unit="B", unit_scale=True, desc="copy", disable=not progress
    ) as bar:
        copied = _in_threads(files, partial(_copy, dataset.store, destination, bar), bar)
    for name, data in unlisted.items():
        retried(destination.put, name, data)
    retried(destination.put, MANIFEST_NAME, retried(manifest_bytes, dataset))
    if destination.is_local:  # other stores have no such folder
        destination.delete_folder(RUN_FOLDER)
    return TransferResult(
        dataset_id=dataset.dataset_id,
        files=sum(copied),
        bytes=sum(file.bytes for file, was_copied in zip(files, copied, strict=True) if was_copied),
        already_there=len(files) - sum(copied),
    )


def _copy(source: Store, destination: Store, bar: tqdm, file: FileRecord, on_block: Callable[[int], None]) -> bool:
    """Copy a file, again from its start if that fails temporarily."""
    counted = 0

    def count(size: int) -> None:
        nonlocal counted
        counted += size
        on_block(size)

    def attempt() -> bool:
        nonlocal counted
        bar.update(-counted)
        counted = 0
        return copy_file(source, file, destination, count)

    return retried(attempt, bar=bar)


def retried(call: Callable[..., Result], *arguments: Any, bar: tqdm | None = None) -> Result:
    """The result of a call to a store, which is repeated up to `ATTEMPTS` times while it fails temporarily.

    A wait is at least as long as the store asks for. It is shown above the progress bar, if there is one, and logged.
    """

    def on_wait(wait_s: float, error: BaseException) -> None:
        found = visible(str(getattr(error, "found", error)))[:200]
        if bar is not None and not bar.disable:
            bar.write(f"waiting {wait_s:.0f} s: {found}", file=sys.stderr)
        else:
            logger.warning("waiting %.0f s: %s", wait_s, found)

    result: Result = retrying(is_transient, attempts=ATTEMPTS, on_wait=on_wait)(call, *arguments)
    return result


def _without_taken_card(unlisted: dict[str, bytes], destination: Store, *, keep: bool) -> dict[str, bytes]:
    """The files without the card, if the destination has another one that someone edited. Raises `CardExists`."""
    there = _read_if_there(destination, CARD_NAME)
    if CARD_NAME not in unlisted or there is None or there == unlisted[CARD_NAME] or is_unedited(there):
        return unlisted
    if not keep:
        raise card_taken(destination.url)
    logger.warning("%s/%s differs from the source's and is kept: remove it to get that one", destination.url, CARD_NAME)
    return {name: data for name, data in unlisted.items() if name not in CARD_FILES}


def require_own_names(dataset: Dataset) -> None:
    """Raise `ForeignFile` if the manifest lists a name that the format does not have: a copy would write it."""
    if names := dataset.manifest.foreign_names:
        raise foreign_file(names[0])


def dataset_files(dataset: Dataset) -> list[FileRecord]:
    """All files that the manifest lists."""
    return [*dataset.manifest.files, *(shard.file for shard in dataset.shards)]


def require_same_dataset(dataset: Dataset, destination: Store) -> None:
    """Raise `AnotherDataset` unless the destination is empty, or a finished or unfinished copy of this dataset."""
    found, header = "", None
    if (manifest := _read_if_there(destination, MANIFEST_NAME)) is not None:
        if dataset_id(manifest) != dataset.dataset_id:
            found = f"a sealed dataset with the id {dataset_id(manifest)}"
    elif destination.names(COMMITS_FOLDER):
        found = "a capture that has not finished"
    elif (header := _read_if_there(destination, HEADER_NAME)) is not None and header != dataset.header.to_bytes():
        found = f"another {HEADER_NAME}"
    elif header is None and (others := other_names(dataset, _top_names(destination))):
        found = f"{len(others)} other files or folders, such as {others[0]}"
    if found:
        raise AnotherDataset(
            destination.url,
            found=found,
            wanted=f"nothing, or a copy of {dataset.dataset_id}",
            fix="choose another destination, or remove what is there",
        )


def other_names(dataset: Dataset, names: Iterable[str]) -> list[str]:
    """Those of the top-level `names` of a place that neither a copy of the dataset nor an empty repository has."""
    own = {file.name.partition("/")[0] for file in dataset_files(dataset)}
    own |= {CARD_NAME, "card", FAITHFULNESS_NAME, RUN_FOLDER}
    return sorted(visible(name)[:200] for name in names if name not in own and not name.startswith((".", "LICENSE")))


def _top_names(store: Store) -> list[str]:
    with named_errors(store.url, "listing it"):
        try:
            return [str(path).rstrip("/").rpartition("/")[2] for path in store.fs.ls(store.root, detail=False)]
        except FileNotFoundError:
            return []


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
    files: list[FileRecord], work: Callable[[FileRecord, Callable[[int], None]], bool], bar: tqdm
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
