"""Files of a source on any store that fsspec reaches: found by path or pattern, opened, digested on the way."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
from tqdm import tqdm

from coldstill.pipeline.errors import SourceNotFound, SourceUnreadable
from coldstill.storage_schema.errors import named_errors
from coldstill.storage_schema.plan import Unit

from .rows import MAX_ROW_BYTES, SourceFile, changed

_READ_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "updated", "created")


def find_files(path: str) -> list[SourceFile]:
    """The files at a path or pattern, in order of their names. Raises `SourceNotFound`, `SourceUnreadable`."""
    fs, inner = _file_system(path)
    with named_errors(path, "looking for the source"):
        if fs.isfile(inner):
            return [_listed(path, fs.info(inner))]
        found = fs.glob(inner, detail=True)
        folders = [name for name, facts in found.items() if facts["type"] == "directory"]
        files = {name: facts for name, facts in found.items() if facts["type"] == "file"}
    if not files:
        what = "a folder" if folders else "no such file"
        hint = f"{path.rstrip('/')}/*.jsonl reads the files of a folder" if folders else "check source.path"
        raise SourceNotFound(path, found=what, wanted="a file, or a pattern of files", fix=hint)
    return [_listed(_whole_name(fs, name), files[name]) for name in sorted(files)]


def files_below(folder: str) -> list[SourceFile]:
    """All files below a local folder, in order of their names."""
    fs = fsspec.filesystem("file")
    found = fs.find(folder, detail=True)
    return [_listed(name, found[name]) for name in sorted(found)]


@contextmanager
def opened(file: SourceFile) -> Iterator[Any]:
    """The file for reading, seekable where its store can. Raises `SourceNotFound`, `StorageFailed`."""
    fs, inner = _file_system(file.name)
    try:
        with named_errors(file.name, "reading the source"), fs.open(inner, "rb") as handle:
            yield handle
    except FileNotFoundError:
        raise SourceNotFound(
            file.name, found="no such file", wanted="the file that the source had", fix="check source.path"
        ) from None


@contextmanager
def opened_for(unit: Unit, file: SourceFile) -> Iterator[Any]:
    """The same for a unit's rows. Raises `SourceChanged` where the file has another size than when it was surveyed."""
    with opened(file) as handle:
        size = getattr(handle, "size", None)
        if size is not None and file.bytes is not None and size != file.bytes:
            raise changed(file.name, unit=unit, found=f"{size:,} bytes", wanted=f"{file.bytes:,} bytes")
        yield handle


class ByteMeter:
    """Digest of each file that is read through it, and a bar over the bytes of all."""

    def __init__(self, files: Sequence[SourceFile], what: str):
        self._digests: list[str] = []
        # Shown only where it takes longer than three seconds.
        self._bar = tqdm(total=_total_bytes(files), unit="B", unit_scale=True, desc=what, delay=3)

    def __enter__(self) -> ByteMeter:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    @contextmanager
    def opened(self, file: SourceFile) -> Iterator[Callable[[int], bytes]]:
        """A function that reads the next bytes of the file; what is not asked for is read at the end."""
        digest = hashlib.sha256()
        with opened(file) as handle:

            def read(size: int) -> bytes:
                with named_errors(file.name, "reading the source"):
                    block: bytes = handle.read(size)
                digest.update(block)
                self._bar.update(len(block))
                return block

            yield read
            while read(_READ_BYTES):
                pass
        self._digests.append(digest.hexdigest())

    @property
    def sha256(self) -> str:
        """Of one file: the digest of its content; of several: that of their digests in hex, each with a line end."""
        if len(self._digests) == 1:
            return self._digests[0]
        return hashlib.sha256("".join(f"{digest}\n" for digest in self._digests).encode()).hexdigest()


def lines_of(read: Callable[[int], bytes], *, name: str, compression: str | None = None) -> Iterator[bytes]:
    """Lines with their ends, from a function that reads bytes. Raises `SourceUnreadable` for damaged compression, and
    for a line of more than `MAX_ROW_BYTES`."""
    if compression:
        read = pa.CompressedInputStream(pa.PythonFile(_Raw(read), mode="r"), compression).read
    buffered = io.BufferedReader(_Raw(read), _READ_BYTES)
    number = 0
    while True:
        try:
            line = buffered.readline(MAX_ROW_BYTES)
        except OSError as error:
            if not compression:
                raise
            raise SourceUnreadable(
                f"{name}: after line {number}",
                found=str(error),
                wanted=f"a whole {compression} file",
                fix="fetch or write the file again; what can be read of it can be packed anew",
            ) from None
        if not line:
            return
        number += 1
        if len(line) == MAX_ROW_BYTES:
            raise SourceUnreadable(
                f"{name}: line {number}", found=f"{MAX_ROW_BYTES:,} bytes without an end", wanted="one row on each line"
            )
        yield line


def sample_sha256(files: Sequence[SourceFile]) -> str:
    """Digest of 64 blocks of 4 KiB, evenly spaced over all files, first and last bytes among them: a cheap sign of
    change beside names, sizes and stamps."""
    digest = hashlib.sha256()
    total = _total_bytes(files)
    offsets = [(total - _SAMPLE_BYTES) * n // (_SAMPLES - 1) for n in range(_SAMPLES)] if total > _SAMPLE_BYTES else [0]
    start = 0
    for file in files:
        stop = start + (file.bytes or 0)
        mine = [offset - start for offset in offsets if start <= offset < stop]
        if mine:
            with opened(file) as handle:
                for offset in mine:
                    handle.seek(offset)
                    digest.update(handle.read(_SAMPLE_BYTES))
        start = stop
    return digest.hexdigest()


class _Raw(io.RawIOBase):
    """What `io.BufferedReader` and Arrow ask of a file, around a function that reads bytes."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _file_system(path: str) -> tuple[Any, str]:
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise SourceUnreadable(
            path,
            found=str(error),
            wanted="a local path, or a URL that fsspec reaches",
            fix="pip install 'coldstill[share]'" if isinstance(error, ImportError) else "check source.path",
        ) from None
    return fs, inner


def _listed(name: str, facts: dict[str, Any]) -> SourceFile:
    stamp = next((str(facts[key]) for key in _STAMPS if facts.get(key)), "")
    return SourceFile(name=name, bytes=facts.get("size"), stamp=stamp)


def _whole_name(fs: Any, name: str) -> str:
    is_local = "file" in ({fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol))
    return name if is_local else str(fs.unstrip_protocol(name))


def _total_bytes(files: Sequence[SourceFile]) -> int:
    return sum(file.bytes or 0 for file in files)
