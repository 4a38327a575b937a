"""A store that retries operations which fail temporarily."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from coldstill.common.retry import retrying
from coldstill.common.visible import visible
from coldstill.storage_schema.errors import StorageFailed, StoreUnreachable, error_codes, is_transient

from .store import Store

_MAY_PASS = (StorageFailed, StoreUnreachable)
"""Exactly these classes: a full disk, missing permissions or a wrong bucket stay as they are."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class RetryingStore(Store):
    """A `Store` whose operations are retried for up to `retry_for_s` seconds, with the waits of `common.retry`.

    `receive` is not, except for its upload. `is_first`: no process has written here yet, as far as the caller can tell.
    Until a write succeeds, only the failures of a busy server are retried then: a wrong address, or a disk that is
    read-only, would fail in the same way again.
    """

    def __init__(self, url: str | Path, *, retry_for_s: float, is_first: bool = False):
        super().__init__(url)
        self._retry_for_s, self._is_first = retry_for_s, is_first
        self._silent_until = 0.0

    def exists(self, name: str) -> bool:
        """See `Store`."""
        return self._retry(super().exists, name)

    def read(self, name: str, *, at_most: int | None = None) -> bytes:
        """See `Store`."""
        return self._retry(super().read, name, at_most=at_most)

    def open(self, name: str) -> BinaryIO:
        """See `Store`. Each read of a remote file is retried too."""
        return self._retry(super().open, name)

    def size(self, name: str) -> int:
        """See `Store`."""
        return self._retry(super().size, name)

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        return self._retry(super().names, folder)

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Store`."""
        return self._retry(super().sizes, folder)

    def delete(self, name: str) -> None:
        """See `Store`."""
        self._retry(super().delete, name)

    def delete_folder(self, name: str) -> None:
        """See `Store`."""
        self._retry(super().delete_folder, name)

    def put(self, name: str, data: bytes) -> None:
        """See `Store`."""
        self._retry(super().put, name, data)
        self._is_first = False

    def upload(self, name: str, local: Path) -> None:
        """See `Store`."""
        self._retry(super().upload, name, local)

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`. False if an earlier attempt created the file and its response was lost, as a commit expects."""
        created = self._retry(super().create, name, data)
        self._is_first = False
        return created

    def _retry(self, call: Callable[..., Result], *values: Any, **options: Any) -> Result:
        return retrying(self._may_pass, seconds=self._retry_for_s, on_wait=self._log)(call, *values, **options)

    def _may_pass(self, error: BaseException) -> bool:
        if self._is_first:
            return is_transient(error) and not isinstance(error, StoreUnreachable)
        # An object that was replaced while it was read is another file, however often it is read.
        return type(error) in _MAY_PASS and "FileExpired" not in error_codes(error)

    def _log(self, wait_s: float, error: BaseException) -> None:
        if time.monotonic() >= self._silent_until:  # many threads may meet the same outage
            self._silent_until = time.monotonic() + wait_s
            found = f"{getattr(error, 'what', '')}: {getattr(error, 'found', error)}"
            logger.warning("waiting %.0f s to try again: %s", wait_s, visible(found)[:300])
