"""What the processes of one machine share in a folder: copies of remote shards, indices, records of verified files.

Any number of processes share a cache folder. Each shard has a lock: one process copies, verifies or indexes it, and the
others wait for that shard only and then find the result. A copy gets its name only after its digest was verified, so
every named copy is correct. Removing a copy that another process has open does not disturb that process.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from coldstill.common.files import new_file
from coldstill.storage_schema.errors import StorageFailed
from coldstill.storage_schema.shard import ShardIndex
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import (
    SHARDS_FOLDER,
    FileRecord,
    check_content,
    copy_file,
    open_file,
    require_size,
)

_LOCK = "lock"
_LOCKS, _INDICES, _VERIFIED = "locks", "index", "verified"
_POLL_S = 0.05
_FINE_STAMP_S = 0.05
"""Linux stamps a change with the time of its last tick, at most 10 ms ago: a file that is five ticks old gets another
stamp at its next change."""
_COARSE_STAMP_S = 2.0
"""The same for file systems that store whole seconds, or every second one."""

Stamp = tuple[int, ...]
"""Device, inode, size, and times of the last change of the content and of the inode (which no program can set)."""


def stamp_of(descriptor: int) -> Stamp:
    """The stamp of an open file: equal stamps mean equal bytes, once the file is older than a tick of the clock."""
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


class ShardCache:
    """Copies in `folder`, at most `most_bytes` together. A shard larger than that is cached alone.

    Beside them are the index of each shard that was read and, for shards of local datasets, a record that its digest
    was verified. Where the folder cannot be written, these are made by each process for itself.
    """

    def __init__(self, folder: Path, *, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes

    def path(self, source: Store, file: FileRecord) -> Path:
        """Path of the local copy of `file`, made first if it is missing. Raises what `open` raises."""
        with self.open(source, file):
            return self._copy(file)

    def open(self, source: Store, file: FileRecord) -> BinaryIO:
        """The local copy of `file` of the dataset at `source`. A missing copy is made first.

        Raises `ShardMissing`, `ShardDamaged`, `StorageFailed`, `StorageFull`.
        """
        if (found := self._opened(file)) is not None:
            return found
        with self._making(file):
            if (found := self._opened(file)) is not None:
                return found
            for left in (self._copy(file), *(self.folder / file.sha256 / RUN_FOLDER).glob("*")):
                left.unlink(missing_ok=True)  # a copy of a wrong size, and parts of killed processes
            # Clients of object stores cache listings: an object that was replaced would look as it did.
            source.fs.invalidate_cache()
            require_size(source, file)
            with self._room(file):
                # Named by its digest: datasets that share a shard share its copy.
                copy_file(source, file, Store(self.folder / file.sha256), on_block=lambda _: None)
            return self._copy(file).open("rb")  # no other process removes it while its lock is held

    def open_verified(self, source: Store, file: FileRecord, *, known: Stamp | None = None) -> tuple[BinaryIO, Stamp]:
        """`file` of the local dataset at `source`, whose digest this machine verified, and its stamp.

        The digest is computed unless the stamp is `known` or that of the record on disk. A changed file has another
        stamp, so it is verified again. Raises `ShardMissing`, `ShardDamaged`, `StorageFailed`.
        """
        opened = open_file(source, file)
        try:
            stamp = stamp_of(opened.fileno())
            if stamp == known or self._is_recorded(source, file, stamp):
                return opened, stamp
            with self.lock(file):
                if self._is_recorded(source, file, stamp):
                    return opened, stamp
                is_settled = _settle(stamp)
                check_content(source, file, opened)
                # A file that changed while it was read keeps its old stamp here: the next look verifies it again.
                if is_settled and stamp_of(opened.fileno()) == stamp:
                    self._record(source, file, stamp)
            return opened, stamp
        except BaseException:
            opened.close()
            raise

    def index(self, file: FileRecord, *, rows: int) -> ShardIndex | None:
        """The stored index of a shard of `rows` rows; None if there is none."""
        path = self.folder / _INDICES / file.sha256
        try:
            return ShardIndex.from_bytes(path.read_bytes(), rows=rows)
        except OSError:
            return None

    def make_index(self, file: FileRecord, *, rows: int, make: Callable[[], ShardIndex]) -> ShardIndex:
        """The index of a shard, made and stored by one process of this machine. Raises what `make` raises."""
        with self.lock(file):
            if (found := self.index(file, rows=rows)) is not None:
                return found
            made = make()
            with suppress(OSError), new_file(self.folder / _INDICES / file.sha256) as beside:
                beside.write_bytes(made.to_bytes())
            return made

    @contextmanager
    def lock(self, file: FileRecord) -> Iterator[None]:
        """Exclusive work on a shard. Without a lock if the folder takes none: work is then repeated, never wrong."""
        lock: FileLock | None = None
        with suppress(OSError, NotImplementedError):
            lock = self._locked(file)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def _making(self, file: FileRecord) -> Iterator[None]:
        """The lock of a copy. Raises `StorageFailed` if the folder cannot be written."""
        try:
            lock = self._locked(file)
        except OSError as error:
            raise StorageFailed(
                f"{self.folder}: the folder for copies of remote shards",
                found=str(error),
                wanted="a folder that this user can write",
                fix="set data.cache_dir (cache_dir of load_logit_dataset) or COLDSTILL_CACHE to such a folder",
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _locked(self, file: FileRecord) -> FileLock:
        (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCKS / file.sha256)
        lock.acquire()
        return lock

    def _copy(self, file: FileRecord) -> Path:
        return self.folder / file.sha256 / file.name

    def _opened(self, file: FileRecord) -> BinaryIO | None:
        """The copy, marked as the most recently used one; None if there is none, or a crash of the machine cut it."""
        try:
            copy = self._copy(file).open("rb")
        except OSError:
            return None
        if os.fstat(copy.fileno()).st_size == file.bytes:
            with suppress(OSError):
                os.utime(self._copy(file))
            return copy
        copy.close()
        return None

    @contextmanager
    def _room(self, file: FileRecord) -> Iterator[None]:
        """Reserve the bytes of a copy while it is made; call it with the copy's lock."""
        reserved = self.folder / file.sha256 / RUN_FOLDER / "reserved"
        while not self._reserve(reserved, file.bytes):
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            reserved.unlink(missing_ok=True)

    def _reserve(self, reserved: Path, wanted: int) -> bool:
        """Remove least recently used copies until `wanted` bytes fit. False if running copies leave no room yet."""
        with FileLock(self.folder / _LOCK):
            running = self._running_bytes()
            copies = sorted((path.stat().st_mtime_ns, path) for path in self.folder.glob(f"*/{SHARDS_FOLDER}/*"))
            sizes = {path: path.stat().st_size for _, path in copies}
            for _, path in copies:
                if running + sum(sizes.values()) + wanted <= self.most_bytes:
                    break
                if _without_waiting(self._lock_of(path), partial(_remove, path)):
                    del sizes[path]
            if running + sum(sizes.values()) + wanted > self.most_bytes and (running or sizes):
                return False
            reserved.parent.mkdir(parents=True, exist_ok=True)
            reserved.write_bytes(b"")
            os.truncate(reserved, wanted)  # a size without bytes on the disk
            return True

    def _running_bytes(self) -> int:
        """Bytes of copies in the making. Files that killed processes left are removed."""
        total = 0
        for part in self.folder.glob(f"*/{RUN_FOLDER}/*"):
            is_left = _without_waiting(self._lock_of(part), partial(part.unlink, missing_ok=True))
            if not is_left and part.name == "reserved":
                with suppress(FileNotFoundError):  # finished meanwhile: it is counted as a copy
                    total += part.stat().st_size
        return total

    def _lock_of(self, path: Path) -> FileLock:
        """The lock of the shard that a file two folders below its digest belongs to."""
        return FileLock(self.folder / _LOCKS / path.parent.parent.name)

    def _is_recorded(self, source: Store, file: FileRecord, stamp: Stamp) -> bool:
        try:
            recorded = json.loads(self._record_path(source, file).read_bytes())
        except (OSError, ValueError):
            return False
        return bool(recorded == {"path": _real(source, file), "sha256": file.sha256, "stamp": list(stamp)})

    def _record(self, source: Store, file: FileRecord, stamp: Stamp) -> None:
        document = {"path": _real(source, file), "sha256": file.sha256, "stamp": stamp}
        with suppress(OSError), new_file(self._record_path(source, file)) as beside:
            beside.write_text(json.dumps(document), encoding="utf-8")

    def _record_path(self, source: Store, file: FileRecord) -> Path:
        return self.folder / _VERIFIED / hashlib.sha256(_real(source, file).encode()).hexdigest()


def _real(source: Store, file: FileRecord) -> str:
    return os.path.realpath(f"{source.root}/{file.name}")


def _settle(stamp: Stamp) -> bool:
    """Wait until a change gets another stamp. False if the file's clock is ahead: its stamp then proves nothing."""
    changed_ns = stamp[-1]
    margin = _FINE_STAMP_S if changed_ns % 1_000_000_000 else _COARSE_STAMP_S
    wait = margin - (time.time_ns() - changed_ns) / 1e9
    if wait > margin:
        return False
    time.sleep(max(0.0, wait))
    return True


def _without_waiting(lock: FileLock, work: Callable[[], object]) -> bool:
    """Do `work` with a lock that is free. Returns whether it was."""
    try:
        with lock.acquire(timeout=0):
            work()
    except Timeout:
        return False
    return True


def _remove(copy: Path) -> None:
    copy.unlink(missing_ok=True)
    for folder in (copy.parent, copy.parent.parent / RUN_FOLDER, copy.parent.parent):
        with suppress(OSError):
            folder.rmdir()
