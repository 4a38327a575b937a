"""A store that retries operations which fail temporarily."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from coldstill.common.retry import retrying
from coldstill.storage_schema.errors import StorageFailed, StoreUnreachable

from .store import Store

_TRANSIENT = (StorageFailed, StoreUnreachable)
"""Exactly these classes: a full disk, missing permissions or a wrong bucket stay as they are."""

Result = TypeVar("Result")


class RetryingStore(Store):
    """A `Store` whose operations are retried for up to `retry_for_s` seconds, with the waits of `common.retry`.

    `open`, `size`, `receive` and `upload` are not retried.
    """

    def __init__(self, url: str | Path, *, retry_for_s: float):
        super().__init__(url)
        self._retry_for_s = retry_for_s

    def exists(self, name: str) -> bool:
        """See `Store`."""
        return self._retry(super().exists, name)

    def read(self, name: str, *, at_most: int | None = None) -> bytes:
        """See `Store`."""
        return self._retry(super().read, name, at_most=at_most)

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        return self._retry(super().names, folder)

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Store`."""
        return self._retry(super().sizes, folder)

    def delete(self, name: str) -> None:
        """See `Store`."""
        self._retry(super().delete, name)

    def put(self, name: str, data: bytes) -> None:
        """See `Store`."""
        self._retry(super().put, name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`. False if an earlier attempt created the file and its response was lost, as a commit expects."""
        return self._retry(super().create, name, data)

    def _retry(self, call: Callable[..., Result], *values: str | bytes, **options: int | None) -> Result:
        return retrying(_is_transient, seconds=self._retry_for_s)(call, *values, **options)


def _is_transient(error: BaseException) -> bool:
    return type(error) in _TRANSIENT
