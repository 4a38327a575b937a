"""Reads and checks the images of a row: from the row itself, from files, object stores, and hosts that are allowed.

A stranger wrote the places: nothing but the image's bytes is read, and never more of them than an image may have. The
details of rejects quote the row, and hold no path of this machine.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import http.client
import os
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

import cachetools
import fsspec
from fsspec.implementations.local import LocalFileSystem

from coldstill.common.errors import first_line
from coldstill.common.images import (
    MAX_IMAGE_BYTES,
    ImageTooLarge,
    ImageUnreadable,
    ImageUnsupported,
    decoded,
    image_type,
)
from coldstill.common.visible import visible
from coldstill.pipeline.errors import ImageHostFailed, SourceNotFound
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.source_config import SourceConfig
from coldstill.storage_schema.errors import StorageFailed, named_errors
from coldstill.storage_schema.rows import MediaReference

from .conversation import RowUnusable
from .image_parts import Content

_REASONS = {
    ImageUnreadable: RejectReason.IMAGE_UNREADABLE,
    ImageUnsupported: RejectReason.IMAGE_UNSUPPORTED,
    ImageTooLarge: RejectReason.IMAGE_TOO_LARGE,
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory"}
_WEB = {"http", "https"}
_ABSENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
}
_KNOWN_TYPES = 1 << 16
"""Digests of images that were checked already: a data set may ask several questions about one image."""
_QUOTED = 120
_ATTEMPTS, _PAUSE_S = 3, 1.0
_TIMEOUT_S, _DOWNLOAD_S = 30.0, 300.0
_BLOCK_BYTES = 1 << 18
_LATER = {408, 425, 429}
"""HTTP status codes after which the same request may succeed; those of 500 and above too."""


class ImageReader:
    """Reads the images of one source's rows. Not thread-safe."""

    def __init__(self, source: SourceConfig):
        self._hosts = frozenset(host.lower() for host in source.image_hosts)
        self._is_remote = _is_remote(source)
        self._unproven_root = source.image_root
        root = source.image_root if source.image_root is not None else _folder_of(source)
        self._root = root if root is None else os.path.expanduser(root)  # as fsspec does for source.path
        named = (source.path, source.image_root, f"hf://datasets/{source.dataset}" if source.dataset else None)
        self._stores = tuple(start for url in named if url is not None for start in _store_of(url))
        self._types: cachetools.LRUCache[str, str] = cachetools.LRUCache(_KNOWN_TYPES)
        self._web = urllib.request.build_opener(_Redirects(self._check_host))

    def read(self, images: Sequence[Content], positions: Sequence[int]) -> tuple[MediaReference, ...]:
        """The images with their bytes; `positions`: indices of their placeholders, one for each.

        Raises `RowUnusable` for an image that is absent, not allowed or not usable, `SourceNotFound` for a
        `source.image_root` that does not exist, and `StorageFailed` or `ImageHostFailed` for a store or host that may
        answer later.
        """
        media = []
        for number, (content, position) in enumerate(zip(images, positions, strict=True)):
            data = content if isinstance(content, bytes) else self._bytes_at(content, f"image {number}")
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 not in self._types:
                self._types[sha256] = _checked_type(data, f"image {number}")
            media.append(MediaReference(position=position, type=self._types[sha256], sha256=sha256, data=data))
        return tuple(media)

    def _bytes_at(self, place: str, what: str) -> bytes:
        scheme = match[1].lower() if (match := _SCHEME.match(place)) else ""
        if scheme in _WEB:
            return self._downloaded(place, what)
        if "::" in place or (scheme and scheme != "file" and scheme not in _STORES):
            wanted = "a path, or an address of http, https or an object store"
            raise _not_found(what, place, f"addresses of this kind are not read; wanted {wanted}")
        if scheme in _STORES:
            if not place.startswith(self._stores):
                why = "an address of another store than that of the source or of source.image_root"
                raise _not_found(what, place, why)
            return _from_store(place, what)
        path = place
        if scheme == "file":
            path = place[len("file:") :].removeprefix("//")
            path = path if os.path.exists(path) else unquote(path)  # Path.as_uri() quotes, and others do not
        if os.path.isabs(path):
            if self._is_remote:
                raise _not_found(what, place, "an absolute path, which is not read for a source of another machine")
            return _from_disk(path, what, place)
        try:
            return self._below_root(path, what, place)
        except RowUnusable:
            self._require_root()
            raise

    def _require_root(self) -> None:
        """Check that the folder exists: without it, all rows with images would be rejected.

        A local one is checked for each absent image, because a network's folder may go away during a capture.
        """
        if (root := self._unproven_root) is None:
            return
        with named_errors(root, "looking for source.image_root"):
            fs, inner = fsspec.core.url_to_fs(root)
            if fs.isdir(inner):
                self._unproven_root = root if isinstance(fs, LocalFileSystem) else None
                return
        raise SourceNotFound(
            f"source.image_root {root}",
            found="no such folder",
            wanted="the folder that relative paths of images start at, on every machine with a worker",
            fix="correct source.image_root",
        )

    def _below_root(self, path: str, what: str, place: str) -> bytes:
        if self._root is None:
            raise _not_found(what, place, "a relative path; source.image_root names the folder that it starts at")
        if (scheme := _SCHEME.match(self._root)) is None or scheme[1].lower() == "file":
            root = self._root.removeprefix("file:").removeprefix("//")
            if self._is_remote and os.path.normpath(path).startswith(".."):
                raise _not_found(what, place, "a path out of source.image_root")
            return _from_disk(os.path.join(root, path), what, place)
        if ".." in path.split("/"):
            raise _not_found(what, place, "a path out of the source's folder")
        return _from_store(f"{self._root.rstrip('/')}/{path}", what)

    # http

    def _downloaded(self, url: str, what: str) -> bytes:
        address = self._check_host(url, what)
        request = urllib.request.Request(address, headers={"User-Agent": "coldstill"})
        for attempt in range(_ATTEMPTS):
            try:
                with self._web.open(request, timeout=_TIMEOUT_S) as response:
                    return _bounded(response, what, seconds=_DOWNLOAD_S)
            except urllib.error.HTTPError as error:
                if 300 <= error.code < 400:
                    raise _not_found(what, url, "a redirect to a host that is not in source.image_hosts") from None
                if error.code < 500 and error.code not in _LATER:
                    raise _not_found(what, url, f"HTTP status {error.code}") from None
                failure: Exception = error
            except (ValueError, http.client.InvalidURL):
                raise _not_found(what, url, "not an address") from None
            except (OSError, http.client.HTTPException) as error:
                failure = error
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_PAUSE_S * (attempt + 1))
        host = urlsplit(address).netloc
        raise ImageHostFailed(
            f"images of {host}",
            found=first_line(failure),
            wanted=f"an answer within {_ATTEMPTS} attempts",
            fix=f"re-run the same command to resume, or take {host} out of source.image_hosts, which rejects its rows",
        ) from None

    def _check_host(self, url: str, what: str) -> str:
        """The address as it is sent. Raises `RowUnusable` for one of a host that is not allowed."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise _not_found(what, url, "not an address") from None
        if parts.scheme.lower() not in _WEB or not host or "@" in parts.netloc:
            raise _not_found(what, url, "not an address of a host")
        if (named := f"{host}:{port}" if port else host) not in self._hosts:
            raise _not_found(what, url, f"host {visible(named)[:_QUOTED]} is not in source.image_hosts")
        path, query = quote(parts.path, safe="/%:@!$&'()*+,;=~"), quote(parts.query, safe="/%:@!$&'()*+,;=~?")
        return SplitResult(parts.scheme.lower(), parts.netloc.lower(), path or "/", query, "").geturl()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to a host that is allowed."""

    def __init__(self, check: Callable[[str, str], str]):
        self._check = check

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The next request; None for a host that is not allowed, after which the opener raises the status."""
        try:
            address = self._check(newurl, "image")
        except RowUnusable:
            return None
        return super().redirect_request(req, fp, code, msg, headers, address)


def _checked_type(data: bytes, what: str) -> str:
    """MIME type of an image whose pixels were decoded. Raises `RowUnusable`."""
    try:
        decoded(data, where=what)
        return image_type(data, where=what)
    except (ImageUnreadable, ImageUnsupported, ImageTooLarge) as error:
        reason = _REASONS[type(error)]
        raise RowUnusable(reason, f"{what}: {error.found}; wanted {error.wanted}") from None


def _from_disk(path: str, what: str, place: str) -> bytes:
    try:
        # A pipe or a device would never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _not_found(what, place, "not a file")
        with named_errors(place, "reading an image"), open(path, "rb") as handle:
            return _bounded(handle, what)
    except ValueError:
        raise _not_found(what, place, "not a path") from None
    except OSError as error:
        if error.errno in _ABSENT:
            raise _not_found(what, place, os.strerror(error.errno or 0)) from None
        with named_errors(place, "reading an image"):
            raise
        raise AssertionError from error  # for mypy: the context does not suppress


def _from_store(url: str, what: str) -> bytes:
    """A file of the source's own store. Raises `RowUnusable` if it is absent, and `StorageFailed`."""
    try:
        with named_errors(url, "reading an image"):
            fs, inner = fsspec.core.url_to_fs(url)
            with fs.open(inner, "rb") as handle:
                return _bounded(handle, what)
    except FileNotFoundError:
        raise _not_found(what, url, "no such file") from None
    except StorageFailed as error:
        if isinstance(error.__cause__, IsADirectoryError | ValueError):  # a folder, or a name that no file can have
            raise _not_found(what, url, f"not a file: {type(error.__cause__).__name__}") from None
        raise


def _store_of(url: str) -> list[str]:
    """How addresses of the same bucket begin, or of the same repository of the Hub."""
    scheme = _SCHEME.match(url)
    if scheme is None or scheme[1] not in _STORES:
        return []
    parts = url.split("/")
    start = "/".join(parts[: 5 if scheme[1] == "hf" else 3]).partition("@")[0]
    return [f"{start}/", f"{start}@"]


def _bounded(handle: Any, what: str, *, seconds: float | None = None) -> bytes:
    """All bytes of an open file, read in blocks.

    Raises `RowUnusable` for more than an image may have, `TimeoutError` after `seconds`.

    """
    started = time.monotonic()
    blocks: list[bytes] = []
    size = 0
    while block := handle.read(_BLOCK_BYTES):
        blocks.append(block)
        size += len(block)
        if size > MAX_IMAGE_BYTES:
            detail = f"{what}: more than {MAX_IMAGE_BYTES:,} bytes"
            raise RowUnusable(RejectReason.IMAGE_TOO_LARGE, detail)
        if seconds is not None and time.monotonic() - started > seconds:
            raise TimeoutError(f"no whole image within {seconds:.0f} s")
    return b"".join(blocks)


def _is_remote(source: SourceConfig) -> bool:
    """Whether another machine, whose owner is a stranger, holds the source."""
    if source.path is None:
        return not Path(source.dataset or "").is_dir()
    scheme = _SCHEME.match(source.path)
    return scheme is not None and scheme[1].lower() != "file"


def _folder_of(source: SourceConfig) -> str | None:
    """The folder of the source's files; of a pattern, the part of it without wildcards. None for a Hub dataset."""
    if source.path is None:
        return source.dataset if Path(source.dataset or "").is_dir() else None
    if glob.has_magic(source.path):
        fixed = source.path[: min(source.path.index(sign) for sign in "*?[" if sign in source.path)]
        return fixed.rpartition("/")[0] or ("/" if fixed.startswith("/") else ".")
    if not _is_remote(source) and Path(source.path).is_dir():
        return source.path
    return source.path.rpartition("/")[0] or ("/" if source.path.startswith("/") else ".")


def _not_found(what: str, place: str, why: str) -> RowUnusable:
    shown = place.partition("?")[0] if _SCHEME.match(place) else place
    if os.path.isabs(shown):
        shown = shown.rpartition("/")[2]
    quoted = visible(shown if len(shown) <= _QUOTED else f"...{shown[-_QUOTED:]}")
    return RowUnusable(RejectReason.IMAGE_NOT_FOUND, f"{what}, '{quoted}': {why}")
