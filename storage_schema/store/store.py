"""`Store`: a dataset's directory on any store, with the two writes of the commit protocol.

`put` writes a file whole or not at all. `create` does the same, and of several writers only the first succeeds.
A local file is written under a temporary name, synced, and linked to its final name (a rename would overwrite). Object
stores write whole objects and have their own "if absent" condition: S3 `If-None-Match: *`, Google
`ifGenerationMatch=0`, which gcsfs sends for `mode="create"`, raising `FileExistsError` on status 412.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from coldstill.common.retry import retrying
from coldstill.storage_schema.errors import CommitDamaged, UnsupportedStore, error_codes, named_errors

from . import local

RUN_FOLDER = "_run"
CREATE_IF_ABSENT = frozenset({"file", "local", "memory", "s3", "s3a", "gs", "gcs"})
"""Protocols of stores that can create a file only if it is absent."""

MAX_FILE_BYTES = 512 << 20
"""Maximum bytes of a file that is read whole: the largest shard, and more than any other such file."""
_READ_AHEAD_BYTES = 1 << 20
"""Bytes that are read at once from a remote file: a footer or a small column takes one request, a row group one
more."""
_CREATE_ATTEMPTS = 5
"""Attempts to create an object while S3 responds 409, because another writer is creating it."""
_PLACE_ATTEMPTS = 3

Result = TypeVar("Result")


class Store:
    """The files of one dataset. Names are relative to its root and use `/`."""

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        try:
            if self.url.endswith(":") and str(url).endswith("/"):
                raise ValueError("an address that is only a protocol")
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

    def require_usable(self) -> None:
        """Raises `UnsupportedStore` for an output that no command can write, as far as it shows without a write."""
        if not self._can_create:
            raise self._unsupported()
        if self.is_local:
            local.require_folder(self.root)

    def require_writable(self) -> None:
        """Raises `UnsupportedStore` unless a capture can write here, and `StorageFailed` if a write fails.

        On an object store a probe file is created twice: some stores with an S3 interface accept the condition of a
        `create` and ignore it, and so does gcsfs on a zonal bucket of Google's.
        """
        self.require_usable()
        if self.is_local:
            return
        probe = f"{RUN_FOLDER}/probe-{secrets.token_hex(8)}"
        self.create(probe, b"1")
        try:
            if self.create(probe, b"2"):
                raise self._unsupported()
        finally:
            self.delete(probe)

    def _unsupported(self) -> UnsupportedStore:
        return UnsupportedStore(
            f"store of {self.url}",
            found="no way to create a file only if it is absent",
            wanted="a local folder, s3://, gs:// or memory://",
            fix="capture to one of those and copy the sealed dataset",
        )

    def path(self, name: str) -> str:
        """Full path of `name`. Raises `CommitDamaged` for a name that points outside the root."""
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise CommitDamaged("a file's name", found=repr(name), wanted="a relative path inside the dataset")
        return f"{self.root}/{name}"

    def local_path(self, name: str) -> Path:
        """The real path of a file of a local store. Raises `FileNotFoundError`, `OutsideDataset`."""
        self.path(name)
        return local.local_file(self.root, name)

    def exists(self, name: str) -> bool:
        """Whether the file exists now, without cached listings: another writer may have created it."""
        with self._named_errors(f"looking for {name}"):
            self.fs.invalidate_cache(self.path(name))
            return bool(self.fs.exists(self.path(name)))

    def read(self, name: str, *, at_most: int | None = None) -> bytes:
        """The content of a file.

        Raises `FileNotFoundError`, `OutsideDataset`, `StorageFailed`; `CommitDamaged` for a file of more than `at_most`
        bytes, before it is read. Without `at_most`, a local file has at most `MAX_FILE_BYTES`: an archive can hold one
        of any size that takes no room. The size of a remote file would be one more request.
        """
        if at_most is None and self.is_local:
            at_most = MAX_FILE_BYTES
        if at_most is not None and (size := self.size(name)) > at_most:
            raise CommitDamaged(f"{self.url}/{name}: size", found=f"{size} bytes", wanted=f"at most {at_most}")
        with self._named_errors(f"reading {name}"):
            if self.is_local:
                return self.local_path(name).read_bytes()
            try:
                return self._seeing_new_files(name, self.fs.cat_file)
            except OSError as error:
                if error_codes(error) & {"IsADirectoryError", "EntryNotFoundError"}:  # the second is the Hub's
                    raise FileNotFoundError(self.path(name)) from error
                raise

    def open(self, name: str) -> BinaryIO:
        """The file, seekable; a remote one is read by ranges on demand. Raises what `read` raises."""
        with self._named_errors(f"reading {name}"):
            if self.is_local:
                return self.local_path(name).open("rb")
            if self._in_memory:  # its files share one position among all who open them
                return io.BytesIO(self.read(name))
            read = partial(self.fs.open, mode="rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead")
            file = self._seeing_new_files(name, read)
            if getattr(file, "details", {}).get("type") == "directory":
                raise FileNotFoundError(self.path(name))
            return cast(BinaryIO, _RemoteFile(file, url=self.url, name=name, retry=self._retry))

    def size(self, name: str) -> int:
        """Bytes of the file, without reading it. Raises what `read` raises."""
        with self._named_errors(f"reading {name}"):
            if self.is_local:
                return self.local_path(name).stat().st_size
            facts = self._seeing_new_files(name, self.fs.info)
            if facts["type"] != "file":
                raise FileNotFoundError(self.path(name))
            return int(facts["size"])

    def _seeing_new_files(self, name: str, call: Callable[[str], Any]) -> Any:
        """`call` of the file's path. s3fs caches listings of folders; another process may have written it since."""
        try:
            return call(self.path(name))
        except FileNotFoundError:
            self.fs.invalidate_cache(self.path(name))
            return call(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in `folder`; empty for a folder that does not exist."""
        try:
            with self._named_errors(f"listing {folder}"):
                if self.is_local:  # fsspec lists whole paths, with three times the memory
                    return sorted(os.listdir(self.path(folder)))
                self.fs.invalidate_cache(self.path(folder))
                listed = self.fs.ls(self.path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Web consoles of object stores make a "folder" as an empty object with the folder's own name.
        return sorted(str(path).rsplit("/", 1)[-1] for path in listed if str(path).rstrip("/") != self.path(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file directly in `folder`, by name, from one listing; empty if there is no such folder."""
        try:
            with self._named_errors(f"listing {folder}"):
                if self.is_local:
                    with os.scandir(self.path(folder)) as entries:
                        return {entry.name: local.size_of(entry) for entry in entries if entry.is_file()}
                self.fs.invalidate_cache(self.path(folder))
                listed = self.fs.ls(self.path(folder), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            str(facts["name"]).rsplit("/", 1)[-1]: int(facts["size"]) for facts in listed if facts["type"] == "file"
        }

    def delete(self, name: str) -> None:
        """Removes the file if it exists. Raises `OutsideDataset`, `StorageFailed`."""
        with suppress(FileNotFoundError), self._named_errors(f"deleting {name}"):
            self._require_inside(name)
            self.fs.rm_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Removes the folder and its content if it exists. Raises `OutsideDataset`, `StorageFailed`."""
        with suppress(FileNotFoundError), self._named_errors(f"deleting {name}"):
            self._require_inside(f"{name}/")
            self.fs.invalidate_cache(self.path(name))
            remove = partial(self.fs.rm, self.path(name), recursive=True)
            retrying(_is_filled, attempts=_PLACE_ATTEMPTS)(remove)

    def put(self, name: str, data: bytes) -> None:
        """Writes the file whole, and replaces an existing one. Raises `OutsideDataset`, `StorageFailed`."""
        with self._named_errors(f"writing {name}", writes=True):
            if not self.is_local:
                self.fs.pipe_file(self.path(name), data)
                return
            self._place(name, data, local.replace)

    @contextmanager
    def receive(self, name: str) -> Iterator[Path]:
        """A local path to write to, for files too large for `put`. The file appears under its name when the block
        succeeds, and not otherwise.

        Raises `StorageFailed`.
        """
        with self._named_errors(f"writing {name}", writes=True):
            if not self.is_local:
                with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
                    yield Path(folder, "part")
                    self.upload(name, Path(folder, "part"))
                return
            with self._temporary(name) as part:
                try:
                    yield part
                    local.replace(part, Path(self.path(name)))
                except FileNotFoundError as error:
                    raise local.TemporaryFileGone(str(error)) from error

    def upload(self, name: str, local: Path) -> None:
        """Copies a local file to a remote store, a large one in parts. Raises `StorageFailed`."""
        with self._named_errors(f"writing {name}", writes=True):
            self.fs.put_file(str(local), self.path(name))

    def create(self, name: str, data: bytes) -> bool:
        """Writes the file whole unless it exists. Returns whether this call created it. Raises `StorageFailed`.

        False is also returned if the response of an object store was lost and the client's retry found the object of
        this very call. A caller that needs to know reads the object, as a commit does.
        """
        with self._named_errors(f"writing {name}", writes=True):
            if not self.is_local:
                return self._create_object(name, data)
            return self._place(name, data, local.link)

    def _place(self, name: str, data: bytes, place: Callable[[Path, Path], Result]) -> Result:
        """`place` a temporary local file of `data` at its name. Again, if another process that seals or ends a copy
        removes the temporary files meanwhile."""

        def attempt() -> Result:
            with self._temporary(name) as part:
                part.write_bytes(data)
                return place(part, Path(self.path(name)))

        return retrying(lambda error: isinstance(error, FileNotFoundError), attempts=_PLACE_ATTEMPTS)(attempt)

    def _create_object(self, name: str, data: bytes) -> bool:
        create = partial(self.fs.pipe_file, self.path(name), data, mode="create")
        try:
            retrying(_is_conflict, attempts=_CREATE_ATTEMPTS)(create)
        except FileExistsError:
            return False
        except OSError as error:
            if "PreconditionFailed" in error_codes(error):  # s3fs raises it if the store names the failed condition
                return False
            raise
        return True

    def _retry(self, call: Callable[..., Result], *values: Any, **options: Any) -> Result:
        return call(*values, **options)

    def _require_inside(self, name: str) -> None:
        """Raises `OutsideDataset` if a link leads a change of a local file out of the dataset."""
        if self.is_local:
            local.require_inside(self.root, name.rpartition("/")[0])

    def _temporary(self, name: str) -> AbstractContextManager[Path]:
        for changed in (name, f"{RUN_FOLDER}/"):
            self._require_inside(changed)
        return local.temporary_file(Path(self.root, RUN_FOLDER), final=Path(self.path(name)))

    def _named_errors(self, doing: str, *, writes: bool = False) -> AbstractContextManager[None]:
        return named_errors(self.url, doing, writes=writes)


def _is_conflict(error: BaseException) -> bool:
    return isinstance(error, OSError) and "ConditionalRequestConflict" in error_codes(error)


def _is_filled(error: BaseException) -> bool:
    """Whether another process created a file in a folder while it was removed."""
    return isinstance(error, OSError) and error.errno == errno.ENOTEMPTY


class _RemoteFile(io.RawIOBase):
    """A seekable file that fsspec opened, read by ranges. Its errors are `StorageFailed` or a subclass."""

    def __init__(self, file: Any, *, url: str, name: str, retry: Callable[..., bytes]):
        self._file, self._url, self._doing, self._retry = file, url, f"reading {name}", retry

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes, fewer only at the end. Raises `StorageFailed`."""
        return self._retry(self._read, -1 if size is None else size)  # a failed read leaves the position as it was

    def _read(self, size: int) -> bytes:
        with named_errors(self._url, self._doing):
            return bytes(self._file.read(size))

    def readall(self) -> bytes:
        """All bytes up to the end. Raises `StorageFailed`."""
        return self.read(-1)

    def readinto(self, buffer: Any, /) -> int:
        """Fills `buffer`. Raises `StorageFailed`."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Sets the position, without a request."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return int(self._file.tell())

    def close(self) -> None:
        """Releases the file and its buffers."""
        if not self.closed:
            self._file.close()
        super().close()
