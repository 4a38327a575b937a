"""A store that is asked again while it does not answer. Same calls as `Store`; errors come only when patience ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from coldstill.storage_schema.errors import StorageFailed
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.store.errors import StoreUnreachable

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_PASSING = (StorageFailed, StoreUnreachable)
"""Exactly these: a full disk, missing rights or a wrong bucket do not mend themselves."""

Answer = TypeVar("Answer")


class PatientStore(Store):
    """Tries each operation again for up to `patience_s` seconds, with waits that double up to half a minute."""

    def __init__(self, url: str | Path, *, patience_s: float):
        super().__init__(url)
        self._patience_s = patience_s

    def exists(self, name: str) -> bool:
        """See `Store`."""
        return self._patiently(super().exists, name)

    def read(self, name: str, *, at_most: int | None = None) -> bytes:
        """See `Store`."""
        return self._patiently(super().read, name, at_most=at_most)

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        return self._patiently(super().names, folder)

    def delete(self, name: str) -> None:
        """See `Store`."""
        self._patiently(super().delete, name)

    def put(self, name: str, data: bytes) -> None:
        """See `Store`."""
        self._patiently(super().put, name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`; after an answer that was lost this says no, as a commit expects."""
        return self._patiently(super().create, name, data)

    def _patiently(self, call: Callable[..., Answer], *values: str | bytes, **options: int | None) -> Answer:
        deadline, wait = time.monotonic() + self._patience_s, _FIRST_WAIT_S
        while True:
            try:
                return call(*values, **options)
            except StorageFailed as error:
                if type(error) not in _PASSING or time.monotonic() + wait > deadline:
                    raise
            # A random part, so that a thousand workers do not all come back in the same instant.
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT_S)
