"""A bounded folder of copies of remote shards. A shard's record in, the path of a verified local copy out.

Any number of processes share a folder: one at a time copies, the others wait and find it there. A copy is written
beside, its digest is verified on the way, and only then has it its name: what has a name is right. Removing one that
another process has open takes nothing from that process.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import SHARDS_FOLDER, FileRecord, copy_file

_LOCK = "lock"


class ShardCache:
    """Copies in `folder`, together at most `most_bytes`; a shard that is larger than that is there alone."""

    def __init__(self, folder: Path, *, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes

    def path(self, source: Store, file: FileRecord) -> Path:
        """The local copy of `file` of the dataset at `source`, copied now if it is not there.

        Raises `ShardMissing`, `ShardDamaged`, `StorageFailed`, `StorageFull`.
        """
        # Named by its digest: datasets that share a shard share its copy.
        copies = Store(self.folder / file.sha256)
        copy = self.folder / file.sha256 / file.name
        if self._used(copy, file):
            return copy
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / _LOCK):
            if not self._used(copy, file):
                self._make_room(file.bytes)
                copy_file(source, file, copies, on_block=lambda _: None)
        return copy

    def _used(self, copy: Path, file: FileRecord) -> bool:
        """Whether the copy is there; it is the most recently used one then. One of another size was cut by a crash of
        the machine."""
        try:
            os.utime(copy)
            return copy.stat().st_size == file.bytes
        except OSError:
            return False

    def _make_room(self, wanted: int) -> None:
        """Remove the least recently used copies until `wanted` bytes fit, and what killed processes left behind."""
        for part in self.folder.glob(f"*/{RUN_FOLDER}/*"):
            part.unlink(missing_ok=True)
        copies = sorted((path.stat().st_mtime_ns, path) for path in self.folder.glob(f"*/{SHARDS_FOLDER}/*"))
        total = sum(path.stat().st_size for _, path in copies)
        for _, path in copies:
            if total + wanted <= self.most_bytes:
                return
            total -= path.stat().st_size
            path.unlink()
            for folder in (path.parent, path.parent.parent / RUN_FOLDER, path.parent.parent):
                with suppress(OSError):
                    folder.rmdir()
