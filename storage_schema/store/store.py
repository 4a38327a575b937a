"""A dataset's directory on any store that fsspec reaches, with the two writes that the commit protocol needs.

`put`: a file is there whole or not at all. `create`: the same, and only the first of several writers wins.
Local files are written beside, synced and linked into place (a rename would overwrite); object stores put whole
objects anyway and create with their own "if absent" condition (S3: `If-None-Match: *`; Google: `ifGenerationMatch=0`,
which gcsfs sends for `mode="create"` and answers 412 with `FileExistsError`).
"""

from __future__ import annotations

import io
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from coldstill.storage_schema.errors import CommitDamaged, UnsupportedStore

from . import local
from .errors import error_codes, named_errors
from .remote_file import BLOCK_BYTES, RemoteFile

RUN_FOLDER = "_run"
CREATE_IF_ABSENT = frozenset({"file", "local", "memory", "s3", "s3a", "gs", "gcs"})
"""Protocols whose stores can create a file only if it is absent."""

_CONFLICT_WAITS = (0.1, 0.4, 1.6, 3.2)
"""Seconds between attempts to create an object while S3 answers that another creator is at work (409)."""


class Store:
    """The files of one dataset; every path is relative to its root and uses `/`."""

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        try:
            if self.url.endswith(":") and str(url).endswith("/"):
                raise ValueError("an address that ends with its protocol")
            with named_errors(self.url, "opening the store"):
                fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, NotImplementedError) as error:
            raise UnsupportedStore(
                self.url,
                found=str(error),
                wanted="a local folder, s3://BUCKET/PATH, gs://BUCKET/PATH or hf://datasets/ORG/NAME",
                fix="pip install 'coldstill[share]'" if isinstance(error, ImportError) else "check the address",
            ) from error
        self.fs: fsspec.AbstractFileSystem = fs
        self.root = str(root).rstrip("/")
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.is_local = "file" in protocols
        self._in_memory = "memory" in protocols
        self._can_create = bool(protocols & CREATE_IF_ABSENT)

    def require_writable(self) -> None:
        """Raise `UnsupportedStore` unless a capture can write here, or `StorageFailed` where the store refuses.

        On an object store it is tried: some that speak S3 take the condition of a `create` and ignore it, and so does
        gcsfs on a zonal bucket of Google's.
        """
        refusal = UnsupportedStore(
            f"store of {self.url}",
            found="no way to create a file only if it is absent",
            wanted="a local folder, s3://, gs:// or memory://",
            fix="capture into one of those and copy the sealed dataset",
        )
        if not self._can_create:
            raise refusal
        if self.is_local:
            if os.path.exists(self.root) and not os.path.isdir(self.root):
                raise UnsupportedStore(
                    self.url, found="a file", wanted="a folder, or nothing yet", fix="choose another output"
                )
            return
        probe = f"{RUN_FOLDER}/probe-{secrets.token_hex(8)}"
        self.create(probe, b"1")
        try:
            if self.create(probe, b"2"):
                raise refusal
        finally:
            self.delete(probe)

    def path(self, name: str) -> str:
        """Full path of `name`. Raises `CommitDamaged` for a name that leaves the root."""
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise CommitDamaged("a file's name", found=repr(name), wanted="a relative path inside the dataset")
        return f"{self.root}/{name}"

    def local_path(self, name: str) -> Path:
        """Where a file of a local store really lies. Raises `FileNotFoundError`, `OutsideDataset`."""
        self.path(name)
        return local.local_file(self.root, name)

    def exists(self, name: str) -> bool:
        """Whether the file is there now: another writer may have created it since the last look."""
        with self._named_errors(f"looking for {name}"):
            self.fs.invalidate_cache(self.path(name))
            return bool(self.fs.exists(self.path(name)))

    def read(self, name: str, *, at_most: int | None = None) -> bytes:
        """The whole file. Raises `FileNotFoundError`, `OutsideDataset`, `StorageFailed`; `CommitDamaged` for a file of
        more than `at_most` bytes, before it is read."""
        if at_most is not None and (size := self.size(name)) > at_most:
            raise CommitDamaged(f"{self.url}/{name}: size", found=f"{size} bytes", wanted=f"at most {at_most}")
        with self._named_errors(f"reading {name}"):
            if self.is_local:
                return self.local_path(name).read_bytes()
            try:
                try:
                    return cast(bytes, self.fs.cat_file(self.path(name)))
                except FileNotFoundError:
                    # s3fs believes an earlier listing of the folder; another process may have written since.
                    self.fs.invalidate_cache(self.path(name))
                    return cast(bytes, self.fs.cat_file(self.path(name)))
            except OSError as error:
                if error_codes(error) & {"IsADirectoryError", "EntryNotFoundError"}:  # the second is the Hub's
                    raise FileNotFoundError(self.path(name)) from error
                raise

    def open(self, name: str) -> BinaryIO:
        """The file, seekable; a remote one is read by ranges as they are asked for. Raises as `read` does."""
        with self._named_errors(f"reading {name}"):
            if self.is_local:
                return self.local_path(name).open("rb")
            if self._in_memory:  # its files share one position among all who open them
                return io.BytesIO(self.read(name))
            file = self.fs.open(self.path(name), "rb", block_size=BLOCK_BYTES, cache_type="readahead")
            if getattr(file, "details", {}).get("type") == "directory":
                raise FileNotFoundError(self.path(name))
            return cast(BinaryIO, RemoteFile(file, url=self.url, name=name))

    def size(self, name: str) -> int:
        """Bytes of the file, without reading it. Raises as `read` does."""
        with self._named_errors(f"reading {name}"):
            if self.is_local:
                return self.local_path(name).stat().st_size
            facts = self.fs.info(self.path(name))
            if facts["type"] != "file":
                raise FileNotFoundError(self.path(name))
            return int(facts["size"])

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in `folder`; empty where there is none."""
        try:
            with self._named_errors(f"listing {folder}"):
                if self.is_local:  # what fsspec lists are whole paths, at three times the memory
                    return sorted(os.listdir(self.path(folder)))
                self.fs.invalidate_cache(self.path(folder))
                listed = self.fs.ls(self.path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # A console that makes a "folder" on an object store leaves an empty object of the folder's own name.
        return sorted(str(path).rsplit("/", 1)[-1] for path in listed if str(path).rstrip("/") != self.path(folder))

    def delete(self, name: str) -> None:
        """Remove the file if it is there. Raises `StorageFailed`."""
        with suppress(FileNotFoundError), self._named_errors(f"deleting {name}"):
            self.fs.rm_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Remove the folder and all in it, if it is there. Raises `StorageFailed`."""
        with suppress(FileNotFoundError), self._named_errors(f"deleting {name}"):
            self.fs.invalidate_cache(self.path(name))
            self.fs.rm(self.path(name), recursive=True)

    def put(self, name: str, data: bytes) -> None:
        """Write the file whole, over what was there. Raises `StorageFailed`."""
        with self._named_errors(f"writing {name}", writes=True):
            if not self.is_local:
                self.fs.pipe_file(self.path(name), data)
                return
            with self._beside(name) as part:
                part.write_bytes(data)
                local.replace(part, Path(self.path(name)))

    @contextmanager
    def receive(self, name: str) -> Iterator[Path]:
        """A path of a local file to write; the end of the block puts it in place whole, an error in it does not.

        For files that are too large for `put`. Raises `StorageFailed`.
        """
        with self._named_errors(f"writing {name}", writes=True):
            if not self.is_local:
                with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
                    yield Path(folder, "part")
                    self.upload(name, Path(folder, "part"))
                return
            with self._beside(name) as part:
                yield part
                local.replace(part, Path(self.path(name)))

    def upload(self, name: str, local: Path) -> None:
        """Put a local file's content on a remote store, in parts if it is large. Raises `StorageFailed`."""
        with self._named_errors(f"writing {name}", writes=True):
            self.fs.put_file(str(local), self.path(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write the file whole unless it is there already; whether this call was the one. Raises `StorageFailed`.

        On an object store a call whose answer was lost and whose retry finds its own object says no: whoever needs to
        know reads the object, as a commit does.
        """
        with self._named_errors(f"writing {name}", writes=True):
            if not self.is_local:
                return self._create_object(name, data)
            with self._beside(name) as part:
                part.write_bytes(data)
                return local.link(part, Path(self.path(name)))

    def _create_object(self, name: str, data: bytes) -> bool:
        for wait in (*_CONFLICT_WAITS, None):
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                codes = error_codes(error)
                if "PreconditionFailed" in codes:  # s3fs names it only where the store says which condition failed
                    return False
                if "ConditionalRequestConflict" not in codes or wait is None:
                    raise
                time.sleep(wait)
            else:
                return True
        raise AssertionError("the last attempt returns or raises")

    def _beside(self, name: str) -> AbstractContextManager[Path]:
        return local.beside(Path(self.root, RUN_FOLDER), Path(self.path(name)))

    def _named_errors(self, doing: str, *, writes: bool = False) -> AbstractContextManager[None]:
        return named_errors(self.url, doing, writes=writes)
