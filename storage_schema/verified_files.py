"""Files recorded with size and sha256: verified when they are read, copied between stores, or checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import BinaryIO

from pydantic import Field

from coldstill.common.models import FrozenModel

from .errors import (
    CommitDamaged,
    FileDamaged,
    FileMissing,
    OutsideDataset,
    ShardDamaged,
    ShardMissing,
    StorageFailed,
    error_codes,
)
from .store import MAX_FILE_BYTES, Store

SHARDS_FOLDER = "shards"
MAX_COUNT = 1 << 53
"""The largest integer that every JSON reader keeps exact. `len` accepts values below 2^63 only."""
BLOCK_BYTES = 16 << 20
"""Bytes that each checking or copying thread reads at once: one request to a remote store."""
_CHECKERS = 4


MAX_NAME_CHARS = 261
"""A folder such as `media/`, and as many characters as a file system takes."""


class FileRecord(FrozenModel):
    """A file of the dataset: its relative name, size and sha256."""

    name: str = Field(max_length=MAX_NAME_CHARS)
    bytes: int = Field(ge=0, le=MAX_COUNT)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @property
    def missing(self) -> type[FileMissing]:
        """The error for a file that does not exist: `ShardMissing` for a shard."""
        return ShardMissing if self._is_shard else FileMissing

    @property
    def damaged(self) -> type[FileDamaged]:
        """The error for a file that differs from its record: `ShardDamaged` for a shard."""
        return ShardDamaged if self._is_shard else FileDamaged

    @property
    def _is_shard(self) -> bool:
        return self.name.startswith(f"{SHARDS_FOLDER}/")


def file_record(name: str, data: bytes) -> FileRecord:
    """The record of a file with content `data`."""
    return FileRecord(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def require_size(store: Store, file: FileRecord) -> int:
    """The file's size in bytes, without reading it. Raises `FileMissing`, `FileDamaged` (for a shard `ShardMissing`,
    `ShardDamaged`)."""
    try:
        size = store.size(file.name)
    except FileNotFoundError:
        raise _missing(store, file) from None
    if size != file.bytes:
        raise _damaged(store, file, found=f"{size} bytes", wanted=f"{file.bytes} bytes")
    return size


def read_file(store: Store, file: FileRecord, *, at_most: int = MAX_FILE_BYTES) -> bytes:
    """The content of a file, verified.

    Raises what `require_size` raises, and `FileDamaged` for a file of more than `at_most` bytes, before it is read.
    """
    size = require_size(store, file)
    if size > at_most:
        raise FileDamaged(f"{store.url}/{file.name}: size", found=f"{size} bytes", wanted=f"at most {at_most}")
    data = store.read(file.name)
    _require_digest(store, file, len(data), hashlib.sha256(data).hexdigest())
    return data


def check_file(store: Store, file: FileRecord) -> None:
    """Verifies a file of any size, one block in memory at a time. Raises what `require_size` raises."""
    with open_file(store, file) as source:
        check_content(store, file, source)


def open_file(store: Store, file: FileRecord) -> BinaryIO:
    """The file, seekable, of the right size and not read yet. Raises what `require_size` raises."""
    require_size(store, file)
    try:
        return store.open(file.name)
    except FileNotFoundError:  # deleted meanwhile
        raise _missing(store, file) from None


def check_content(
    store: Store,
    file: FileRecord,
    source: BinaryIO,
    *,
    on_block: Callable[[int], None] = lambda _: None,
    write: Callable[[bytes], object] = bool,
) -> None:
    """Verifies the open file `source`, one block in memory at a time, each of which `write` and `on_block` get.

    Raises `FileDamaged` (`ShardDamaged`), also for an object that is replaced while it is read.
    """
    try:
        found = _digest(source, file.bytes, on_block=on_block, write=write)
    except StorageFailed as error:
        if "FileExpired" in error_codes(error):  # the S3 client's: the object has another ETag than when it was opened
            replaced = "another file, put in its place while it was read"
            raise _damaged(store, file, found=replaced, wanted=_content(file)) from error
        raise
    _require_digest(store, file, *found)


def unusable_files(store: Store, files: Iterable[FileRecord], *, deep: bool = False) -> set[str]:
    """Names of those files that are gone or have another size, by one listing of each folder. `deep`: all files are
    read, and those with another digest are unusable too. Raises `StorageFailed`."""
    by_folder: dict[str, list[FileRecord]] = {}
    for file in files:
        by_folder.setdefault(file.name.rpartition("/")[0], []).append(file)
    found: set[str] = set()
    for folder, listed in by_folder.items():
        sizes: dict[str, int] = {}
        with suppress(CommitDamaged):
            sizes = store.sizes(folder) if folder else {}
        suspects = [file for file in listed if deep or sizes.get(file.name.rpartition("/")[2]) != file.bytes]
        with ThreadPoolExecutor(_CHECKERS) as checkers:
            # A listing may lag behind the writes of other machines: only a request for the file itself decides.
            usable = list(checkers.map(partial(_is_usable, store, deep=deep), suspects))
        found |= {file.name for file, is_usable in zip(suspects, usable, strict=True) if not is_usable}
    return found


def _is_usable(store: Store, file: FileRecord, *, deep: bool) -> bool:
    try:
        if deep:
            check_file(store, file)
        else:
            require_size(store, file)
    except (FileMissing, FileDamaged, CommitDamaged):  # the last for a name or a link that leaves the dataset
        return False
    return True


def copy_file(source: Store, file: FileRecord, destination: Store, on_block: Callable[[int], None]) -> bool:
    """Copies a file, verified on the way. Returns whether it was copied: a file that is already there with the right
    size and digest stays.

    `on_block` is called with the bytes of each block; an exception that it raises ends the copy. A file of a local
    store is uploaded to a remote one without verification: check it before.

    Raises `FileMissing`, `FileDamaged` (for a shard `ShardMissing`, `ShardDamaged`), `StorageFailed`.
    """
    try:
        if destination.size(file.name) == file.bytes:
            with destination.open(file.name) as existing:
                check_content(destination, file, existing)
            on_block(file.bytes)
            return False
    except (FileNotFoundError, FileDamaged, OutsideDataset):
        pass
    if source.is_local and not destination.is_local:
        destination.upload(file.name, source.local_path(file.name))
        on_block(file.bytes)
        return True
    try:
        with source.open(file.name) as reading, destination.receive(file.name) as path, path.open("xb") as writing:
            try:
                check_content(source, file, reading, on_block=on_block, write=writing.write)
            except FileNotFoundError:  # deleted since it was opened; `receive` would take it for an error of its own
                raise _missing(source, file) from None
    except FileNotFoundError:
        raise _missing(source, file) from None
    return True


def _digest(
    reading: BinaryIO,
    wanted_bytes: int,
    *,
    on_block: Callable[[int], None],
    write: Callable[[bytes], object],
) -> tuple[int, str]:
    """Size and sha256. Reading stops one byte after `wanted_bytes`, even if the source sends more."""
    size, sha256 = 0, hashlib.sha256()
    while size <= wanted_bytes and (block := reading.read(min(BLOCK_BYTES, wanted_bytes + 1 - size))):
        size += len(block)
        sha256.update(block)
        write(block)
        on_block(len(block))
    return size, sha256.hexdigest()


def _require_digest(store: Store, file: FileRecord, size: int, sha256: str) -> None:
    if (size, sha256) != (file.bytes, file.sha256):
        found = f"more than {file.bytes} bytes" if size > file.bytes else f"{size} bytes, sha256 {sha256}"
        raise _damaged(store, file, found=found, wanted=_content(file))


def _content(file: FileRecord) -> str:
    return f"{file.bytes} bytes, sha256 {file.sha256}"


def _missing(store: Store, file: FileRecord) -> FileMissing:
    return file.missing(
        f"{store.url}/{file.name}",
        found="no such file",
        wanted="a file that the manifest names",
    )


def _damaged(store: Store, file: FileRecord, *, found: str, wanted: str) -> FileDamaged:
    return file.damaged(f"{store.url}/{file.name}", found=found, wanted=wanted)
