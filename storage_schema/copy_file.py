"""One file from a store to another. Its record and two stores in; out, the file under its name once it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import BinaryIO

from coldstill.storage_schema.commits import SHARDS_FOLDER, FileRecord
from coldstill.storage_schema.errors import FileDamaged, FileMissing, ShardDamaged, ShardMissing
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.store.errors import OutsideDataset

BLOCK_BYTES = 16 << 20
"""Read at once, by each thread: one request of a remote store."""


def copy_file(source: Store, file: FileRecord, destination: Store, on_block: Callable[[int], None]) -> bool:
    """Whether the file had to be moved: what is there, right in size and digest, stays.

    `on_block` hears of the bytes as they pass, and may raise to end it. From a local folder to a remote store a file
    goes as it is, and is to be verified before.

    Raises `FileMissing`, `FileDamaged` (for a shard `ShardMissing`, `ShardDamaged`), `StorageFailed`.
    """
    try:
        if destination.size(file.name) == file.bytes:
            with destination.open(file.name) as there:
                if _digest(there, file.bytes) == (file.bytes, file.sha256):
                    on_block(file.bytes)
                    return False
    except (FileNotFoundError, OutsideDataset):
        pass
    if source.is_local and not destination.is_local:
        destination.upload(file.name, source.local_path(file.name))
        on_block(file.bytes)
        return True
    try:
        with source.open(file.name) as reading, destination.receive(file.name) as path, path.open("xb") as writing:
            _require_digest(reading, source, file, on_block, write=writing.write)
    except FileNotFoundError:
        missing = ShardMissing if _is_shard(file) else FileMissing
        raise missing(
            f"{source.url}/{file.name}",
            found="no such file",
            wanted="a file that the manifest names",
            fix="copy from another place: this copy is not whole",
        ) from None
    return True


def _require_digest(
    reading: BinaryIO,
    source: Store,
    file: FileRecord,
    on_block: Callable[[int], None],
    write: Callable[[bytes], object],
) -> None:
    size, digest = _digest(reading, file.bytes, on_block=on_block, write=write)
    if (size, digest) != (file.bytes, file.sha256):
        damaged = ShardDamaged if _is_shard(file) else FileDamaged
        raise damaged(
            f"{source.url}/{file.name}",
            found=f"more than {file.bytes} bytes" if size > file.bytes else f"{size} bytes, sha256 {digest}",
            wanted=f"{file.bytes} bytes, sha256 {file.sha256}",
            fix="start again; if it stays so, the source is damaged: copy from another place",
        )


def _digest(
    reading: BinaryIO,
    wanted_bytes: int,
    *,
    on_block: Callable[[int], None] = lambda _: None,
    write: Callable[[bytes], object] = bool,
) -> tuple[int, str]:
    """Bytes and sha256; reading ends one byte after `wanted_bytes`, whatever a source goes on to send."""
    size, sha256 = 0, hashlib.sha256()
    while size <= wanted_bytes and (block := reading.read(min(BLOCK_BYTES, wanted_bytes + 1 - size))):
        size += len(block)
        sha256.update(block)
        write(block)
        on_block(len(block))
    return size, sha256.hexdigest()


def _is_shard(file: FileRecord) -> bool:
    return file.name.startswith(f"{SHARDS_FOLDER}/")
