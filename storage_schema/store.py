"""A dataset's directory on any store that fsspec reaches, with the two writes that the commit protocol needs.

`put`: a file is there whole or not at all. `create`: the same, and only the first of several writers wins.
Local files are written beside, synced and linked into place (a rename would overwrite); object stores put whole
objects anyway and create with their own "if absent" condition.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import fsspec

from .errors import CommitDamaged, StorageFailed, StorageFull, UnsupportedStore

RUN_FOLDER = "_run"
CREATE_IF_ABSENT = frozenset({"file", "local", "memory", "s3", "s3a", "gs", "gcs"})
"""Protocols whose stores can create a file only if it is absent."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Store:
    """The files of one dataset; every path is relative to its root and uses `/`."""

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        fs, root = fsspec.core.url_to_fs(self.url)
        self.fs: fsspec.AbstractFileSystem = fs
        self.root = str(root).rstrip("/")
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.is_local = "file" in protocols
        self._can_create = bool(protocols & CREATE_IF_ABSENT)

    def require_writable(self) -> None:
        """Raise `UnsupportedStore` unless a capture can write here."""
        if not self._can_create:
            raise UnsupportedStore(
                f"store of {self.url}",
                found="no way to create a file only if it is absent",
                wanted="a local folder, s3://, gs:// or memory://",
                fix="capture into one of those and copy the sealed dataset",
            )
        if self.is_local and os.path.exists(self.root) and not os.path.isdir(self.root):
            raise UnsupportedStore(
                self.url, found="a file", wanted="a folder, or nothing yet", fix="choose another output"
            )

    def path(self, name: str) -> str:
        """Full path of `name`. Raises `CommitDamaged` for a name that leaves the root."""
        parts = name.split("/")
        if not name or name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise CommitDamaged("a file's name", found=repr(name), wanted="a relative path inside the dataset")
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file is there now: another writer may have created it since the last look."""
        self.fs.invalidate_cache(self.path(name))
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """The whole file; raises `FileNotFoundError`."""
        return cast(bytes, self.fs.cat_file(self.path(name)))

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in `folder`; empty where there is none."""
        try:
            self.fs.invalidate_cache(self.path(folder))
            listed = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rsplit("/", 1)[-1] for path in listed)

    def delete(self, name: str) -> None:
        """Remove the file if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Remove the folder and all in it, if it is there."""
        if self.fs.exists(self.path(name)):
            self.fs.rm(self.path(name), recursive=True)

    def put(self, name: str, data: bytes) -> None:
        """Write the file whole, over what was there. Raises `StorageFailed`."""
        with self._named_errors(name):
            if not self.is_local:
                self.fs.pipe_file(self.path(name), data)
                return
            with self._beside(name, data) as beside:
                os.replace(beside, self.path(name))
                _sync_folder(Path(self.path(name)).parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write the file whole unless it is there already; whether this call was the one. Raises `StorageFailed`."""
        with self._named_errors(name):
            if self.is_local:
                with self._beside(name, data) as beside:
                    created = _link(beside, Path(self.path(name)))
                _sync_folder(Path(self.path(name)).parent)
                return created
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

    @contextmanager
    def _beside(self, name: str, data: bytes) -> Iterator[Path]:
        """A synced local file with `data` under a name of its own, gone afterwards; the final folder exists."""
        Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
        beside = Path(self.root, RUN_FOLDER, f"{os.getpid()}-{secrets.token_hex(8)}.part")
        beside.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield beside
        finally:
            beside.unlink(missing_ok=True)

    @contextmanager
    def _named_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = StorageFull if error.errno in _NO_ROOM else StorageFailed
            raise kind(
                f"{self.url}: writing {name}",
                found=str(error),
                wanted="a store that takes one more file",
                fix="free some room or mend the store, and start the same command again: what was committed stays good",
            ) from error


def _link(beside: Path, final: Path) -> bool:
    """Give a whole file its final name, unless that is taken: a rename would overwrite."""
    try:
        os.link(beside, final)
    except FileExistsError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """A name is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
