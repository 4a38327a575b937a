"""Classes that all source formats share, and access to files through fsspec."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import fsspec
import numpy as np
from pydantic import Field

from coldstill.common.models import FrozenModel
from coldstill.common.progress import tqdm
from coldstill.pipeline.errors import SourceChanged, SourceNotFound, SourceUnreadable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.storage_schema.errors import named_errors
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.shard.layout import MAX_METADATA_DEPTH, is_too_deep

_READ_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_BYTES_KEY = "coldstill:bytes"
"""The one key of an object that stands for bytes in JSON; its value is base64."""
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "updated", "created")


class SourceRow(NamedTuple):
    """Row number `number` of the source.

    `columns` are None if the text of the row is not a JSON object; `problem` and `reason` say why. `is_dropped`: the
    user's adapter returned nothing for the row, whose columns are those before the adapter.
    """

    number: int
    columns: dict[str, Any] | None
    problem: str = ""
    is_dropped: bool = False
    reason: RejectReason = RejectReason.NOT_JSON


class SourceFile(FrozenModel):
    """A file of the source as its store lists it."""

    name: str = Field(description="Local path or URL.")
    bytes: int | None = Field(description="None if the store does not report a size.")
    stamp: str = Field(description="ETag or modification time, which changes with the content; empty if unknown.")
    rows: int = Field(default=0, description="Number of rows, once the source was surveyed.")


class Survey(NamedTuple):
    """The result of one pass over a source.

    `sha256` of the content; number of `rows`; `starts int64 [units]`: where each unit starts, None if that is its first
    row number; `files` with their row counts; `unit_rows int64 [units]`: rows of each unit, None if the settings tell.
    """

    sha256: str
    rows: int
    starts: np.ndarray | None
    files: tuple[SourceFile, ...]
    unit_rows: np.ndarray | None = None


class Reader(ABC):
    """Files with random access to their rows: the rows of a unit are read from where they are."""

    def __init__(self, files: Sequence[SourceFile]):
        self.files = tuple(files)

    @abstractmethod
    def rows(self) -> Iterator[SourceRow]:
        """All rows in order; needs no survey."""

    @abstractmethod
    def survey(self, rows_per_unit: int) -> Survey:
        """Read all content once, with a progress bar. Raises `SourceUnreadable`."""

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[SourceRow]:
        """The rows of one unit of surveyed files. Raises `SourceChanged` if they are no longer there."""


class Stream(ABC):
    """Rows that can only be read from the first one on.

    `files` show whether the source has changed; `sha256` is the digest of its content, known after the last document.
    """

    def __init__(self, files: Sequence[SourceFile]):
        self.files = tuple(files)
        self.sha256: str | None = None

    @abstractmethod
    def documents(self) -> Iterator[bytes]:
        """Each row as JSON, with a progress bar. Raises `SourceUnreadable` if the source is damaged."""

    def rows(self) -> Iterator[SourceRow]:
        """All rows in order."""
        return itertools.starmap(parse_row, enumerate(self.documents()))

    def survey(self, rows: int) -> Survey:
        """The survey, once all `rows` documents were read."""
        assert self.sha256 is not None
        return Survey(self.sha256, rows, None, self.files)


def parse_row(number: int, text: bytes) -> SourceRow:
    """The row of a JSON text in UTF-8, or a row with a problem."""
    if is_too_deep(text):
        return SourceRow(number, None, f"not JSON: nested deeper than {MAX_METADATA_DEPTH:,} levels")
    try:
        # json.loads would guess the encoding of bytes, and read a line of UTF-16 as other text.
        hook = _bytes_if_any if _BYTES_KEY.encode() in text else None
        columns = json.loads(text.decode("utf-8-sig"), object_hook=hook)
    except UnicodeDecodeError as error:
        return SourceRow(number, None, f"not UTF-8: {error}", reason=RejectReason.NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return SourceRow(number, None, f"not JSON: {error}")
    if not isinstance(columns, dict):
        return SourceRow(number, None, f"not a JSON object but {type(columns).__name__}")
    row = SourceRow(number, columns)
    return as_text(row) if b"\\u" in text else row


def as_text(row: SourceRow) -> SourceRow:
    """The row, or one with a problem if its columns hold half of a surrogate pair."""
    problem = lone_surrogate(row.columns)
    return row._replace(columns=None, problem=problem, reason=RejectReason.LONE_SURROGATE) if problem else row


def lone_surrogate(value: Any) -> str:
    """What a reject says of half of a surrogate pair in a value: valid JSON, but not text. Empty without one."""
    try:
        json.dumps(value, ensure_ascii=False, default=lambda _: None).encode()
    except UnicodeEncodeError as error:
        return f"surrogates are not text: half of a pair, \\u{ord(error.object[error.start]):04x}"
    return ""


def json_text(columns: Any) -> bytes:
    """Columns as JSON, which `parse_row` reads: bytes stay bytes. Other values that JSON cannot hold, such as dates,
    become strings, as in metadata."""
    return json.dumps(columns, default=_bytes_or_text).encode()


def _bytes_or_text(value: object) -> object:
    return {_BYTES_KEY: base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)


def _bytes_if_any(value: dict[str, Any]) -> Any:
    """The bytes that an object stands for; any other object as it is."""
    if value.keys() == {_BYTES_KEY} and isinstance(value[_BYTES_KEY], str):
        with suppress(ValueError):
            return base64.b64decode(value[_BYTES_KEY], validate=True)
    return value


def digested_text(columns: Any, text: bytes) -> bytes:
    """What the digest of a stream reads of a row whose `json_text` is `text`.

    With bytes as text, as in the digests of earlier releases, so that a capture which one of them started resumes.
    """
    return json.dumps(columns, default=str).encode() if _BYTES_KEY.encode() in text else text


def changed(name: str, *, unit: Unit, found: str, wanted: str) -> SourceChanged:
    """The error for a unit whose rows are not those of the plan."""
    return SourceChanged(
        f"{name}: unit {unit.index}",
        found=found,
        wanted=f"{wanted}, as when the plan was made",
        fix="restore the source, or capture into another output",
    )


def without_nulls(value: Any) -> Any:
    """A value of a typed column without the null fields that Arrow adds because other rows have them."""
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_folder(path: str) -> bool:
    """Whether a path is a folder. Raises `SourceUnreadable`."""
    fs, inner = _file_system(path)
    with named_errors(path, "looking for the source"):
        return bool(not fs.isfile(inner) and fs.isdir(inner))


def find_files(path: str) -> list[SourceFile]:
    """The files at a path or pattern, sorted by name. Raises `SourceNotFound`, `SourceUnreadable`."""
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
    """All files below a local folder, sorted by name."""
    fs = fsspec.filesystem("file")
    found = fs.find(folder, detail=True)
    return [_listed(name, found[name]) for name in sorted(found)]


@contextmanager
def opened(file: SourceFile) -> Iterator[Any]:
    """The file open for reading, seekable if its store can seek. Raises `SourceNotFound`, `StorageFailed`."""
    fs, inner = _file_system(file.name)
    try:
        with named_errors(file.name, "reading the source"), fs.open(inner, "rb") as handle:
            yield handle
    except FileNotFoundError:
        raise SourceNotFound(
            file.name, found="no such file", wanted="the file that the plan was made from", fix="check source.path"
        ) from None


@contextmanager
def opened_for(unit: Unit, file: SourceFile) -> Iterator[Any]:
    """As `opened`. Raises `SourceChanged` if the size of the file is not that of the survey."""
    with opened(file) as handle:
        size = getattr(handle, "size", None)
        if size is not None and file.bytes is not None and size != file.bytes:
            raise changed(file.name, unit=unit, found=f"{size:,} bytes", wanted=f"{file.bytes:,} bytes")
        yield handle


class ByteMeter:
    """Digests the files that are read through it, and shows a progress bar over the bytes of all of them."""

    def __init__(self, files: Sequence[SourceFile], what: str):
        self._digests: list[str] = []
        self._bar = tqdm(total=_total_bytes(files), unit="B", unit_scale=True, desc=what, delay=3)

    def __enter__(self) -> ByteMeter:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    @contextmanager
    def opened(self, file: SourceFile) -> Iterator[Callable[[int], bytes]]:
        """A function that reads the next bytes of the file; at exit the rest is read too, for the digest."""
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
        """The digest of one file's content; of several files, the digest of their hex digests, one per line."""
        if len(self._digests) == 1:
            return self._digests[0]
        return hashlib.sha256("".join(f"{digest}\n" for digest in self._digests).encode()).hexdigest()


def sample_sha256(files: Sequence[SourceFile]) -> str:
    """Digest of 64 blocks of 4 KiB, evenly spaced over all files, the first and the last bytes among them.

    A cheap check for changes, in addition to names, sizes and stamps.
    """
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


def _file_system(path: str) -> tuple[Any, str]:
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise SourceUnreadable(
            path,
            found=str(error),
            wanted="a local path, or a URL that fsspec opens",
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
