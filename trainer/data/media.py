"""Reads the media of a dataset: content of a row or of a file, each verified, with local copies of remote files.

Copies are files `media/<2 digits>/<sha256>` in the cache folder. Each process adds to one counter of their bytes, under
a lock; the folder is listed only when the counter exceeds the limit, because it may hold a million files.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from coldstill.common.files import new_file
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileDamaged, FileMissing
from coldstill.storage_schema.rows import MAX_MEDIA_BYTES, MEDIA_FOLDER, MediaReference
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import FileRecord, read_file

_COUNTER, _LOCK = "bytes", "lock"
_FREED_SHARE = 8
"""A full cache is emptied by this share of its limit, so that the next listing is a while away."""


class MediaCache:
    """Copies of at most `most_bytes` together, but for those that are being written. The least recently used go first.

    A folder that cannot be written is no error: then nothing is kept.
    """

    def __init__(self, folder: Path, *, most_bytes: int):
        self.folder, self.most_bytes = folder / MEDIA_FOLDER, most_bytes

    def read(self, sha256: str) -> bytes | None:
        """The copy with this digest, verified; None if there is none."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            return None  # cut by a crash of the machine: it is written again
        with suppress(OSError):
            os.utime(path)
        return data

    def keep(self, sha256: str, data: bytes) -> None:
        """Store a verified medium."""
        if len(data) > self.most_bytes:
            return
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / _LOCK):
                self._reserve(len(data))
            with new_file(self._path(sha256)) as beside:
                beside.write_bytes(data)

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _reserve(self, wanted: int) -> None:
        counter = self.folder / _COUNTER
        try:
            total = int(counter.read_bytes())
        except (OSError, ValueError):
            total = self.most_bytes  # not known: count them
        if total + wanted > self.most_bytes:
            total = self._emptied(self.most_bytes - max(wanted, self.most_bytes // _FREED_SHARE))
        with new_file(counter) as beside:
            beside.write_text(str(total + wanted))

    def _emptied(self, limit: int) -> int:
        """Remove the least recently used copies beyond `limit` bytes; the bytes of those that stay."""
        found = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(OSError):  # removed meanwhile
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


class MediaReader:
    """The media of one dataset, for one thread of one process."""

    def __init__(self, dataset: Dataset, store: Store, *, cache: MediaCache | None = None):
        """`store`: of the dataset, opened by this process. Without `cache`, no copies are kept."""
        self._dataset, self._store, self._cache = dataset, store, cache

    def content(self, item: MediaReference) -> bytes:
        """The content of a medium, at most `MAX_MEDIA_BYTES`, whose digest is that of the row.

        Raises `FileMissing`, `FileDamaged`, `StorageFailed`.
        """
        if item.data is not None:
            return item.data  # verified when the row was read
        file = self._files.get(item.path or "")
        where = f"{self._store.url}/{item.path}"
        if file is None:
            raise FileMissing(where, found="no such file in the manifest", wanted="a file that the manifest names")
        if file.sha256 != item.sha256:
            raise FileDamaged(
                where, found=f"sha256 {file.sha256} in the manifest", wanted=f"sha256 {item.sha256}, as in the row"
            )
        if self._store.is_local or self._cache is None:
            return read_file(self._store, file, at_most=MAX_MEDIA_BYTES)
        data = self._cache.read(file.sha256)
        if data is None:
            data = read_file(self._store, file, at_most=MAX_MEDIA_BYTES)
            self._cache.keep(file.sha256, data)
        return data

    @cached_property
    def _files(self) -> dict[str, FileRecord]:
        return {file.name: file for file in self._dataset.manifest.files if file.name.startswith(f"{MEDIA_FOLDER}/")}
