"""A file of a remote store, read by ranges. What fsspec opened in, a seekable file with our errors' names out."""

from __future__ import annotations

import io
import os
from typing import Any

from .errors import named_errors

BLOCK_BYTES = 1 << 20
"""What a remote file reads ahead: a footer or a small column comes with one request, a row group with its own."""


class RemoteFile(io.RawIOBase):
    """A file that fsspec opened, whose errors have our names whenever they come."""

    def __init__(self, file: Any, *, url: str, name: str):
        self._file, self._url, self._doing = file, url, f"reading {name}"

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes, fewer only at the end. Raises `StorageFailed`."""
        with named_errors(self._url, self._doing):
            return bytes(self._file.read(-1 if size is None else size))

    def readall(self) -> bytes:
        """The rest. Raises `StorageFailed`."""
        return self.read(-1)

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`. Raises `StorageFailed`."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a byte; reads nothing."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The byte that comes next."""
        return int(self._file.tell())

    def close(self) -> None:
        """Give the blocks back."""
        if not self.closed:
            self._file.close()
        super().close()
