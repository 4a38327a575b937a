"""Fault points: the file operations of one process below a folder, of which one fails or kills the process.

An operation is to open a file for writing, to write to it, to sync it or a folder, to rename, link or remove a file,
and to make or remove a folder. A write that fails or kills has put the first half of its bytes down, as a full disk
does. What C or Rust code writes without Python's files is not seen: pyarrow, safetensors, torch with a path.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal

Kind = Literal["kill", "EIO", "ENOSPC"]
KINDS: tuple[Kind, ...] = ("kill", "EIO", "ENOSPC")

_OPERATIONS = {
    "open": "open",
    "os.rename": "rename",
    "os.link": "link",
    "os.remove": "remove",
    "os.mkdir": "make folder",
    "os.rmdir": "remove folder",
}
"""Audit events of Python, which come before the operation."""
_RANDOM = re.compile(r"\d*-?[0-9a-f]{8,}")


class FaultPoints:
    """Counts the operations below `root`; operation number `at`, from 0, becomes a fault of this kind.

    An audit hook cannot be taken away, so a process arms one of these once and is forked for it.
    """

    def __init__(self, root: str, *, at: int | None = None, kind: Kind = "kill"):
        self._root, self._at, self._kind = os.path.join(os.path.abspath(root), ""), at, kind
        self._lock = threading.RLock()
        self.seen: list[str] = []

    def arm(self) -> None:
        """Count from here on."""
        plain_open, plain_sync = io.open, os.fsync

        def open_counted(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not self._is_inside(os.fspath(file)):
                return plain_open(file, mode, buffering, *args, **options)
            raw = _CountedFile(os.fspath(file), mode.replace("t", "").replace("b", ""))
            raw.points = self
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            binary: Any = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
            return binary if "b" in mode else io.TextIOWrapper(binary, *args, **options)

        def sync_counted(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self._is_inside(path):
                self.point("sync", path)
            plain_sync(descriptor)

        io.open = builtins.open = open_counted
        os.fsync = sync_counted
        sys.addaudithook(self._audit)

    def point(self, operation: str, path: str, *, half: Any = None) -> None:
        """Count one operation, or make it the fault; `half` does a part of it before."""
        with self._lock:
            number = len(self.seen)
            self.seen.append(f"{operation} {_RANDOM.sub('*', os.path.abspath(path).removeprefix(self._root))}")
        if number != self._at:
            return
        if half is not None:
            half()
        if self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self._kind)
        raise OSError(code, os.strerror(code), path)

    def _audit(self, event: str, arguments: Sequence[Any]) -> None:
        operation = _OPERATIONS.get(event)
        if operation is None:
            return
        if event == "open":
            mode, flags = arguments[1] or "", arguments[2]
            if not (set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        places = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        names = [self._full(place, arguments[-1]) for place in places if not isinstance(place, int)]
        for name in reversed(names):
            if self._is_inside(name):
                self.point(operation, name)
                return

    @staticmethod
    def _full(path: Any, folder: Any) -> str:
        """`shutil.rmtree` names a file by its folder's descriptor."""
        name = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(name):
            return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        return name

    def _is_inside(self, path: Any) -> bool:
        return os.path.join(os.path.abspath(os.fsdecode(path)), "").startswith(self._root)


class _CountedFile(io.FileIO):
    points: FaultPoints

    def write(self, data: Any, /) -> int:
        """Each call is an operation."""
        whole = memoryview(data).cast("B")
        self.points.point("write", os.fsdecode(self.name), half=lambda: io.FileIO.write(self, whole[: len(whole) // 2]))
        return super().write(data)
