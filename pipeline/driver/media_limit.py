"""Ends a capture whose rows need more files in `media/` than a manifest can list, before all of it is captured."""

from __future__ import annotations

from coldstill.pipeline.errors import TooManyMediaFiles
from coldstill.storage_schema.rows import MEDIA_FOLDER
from coldstill.storage_schema.store import Store

MAX_MEDIA_FILES = 200_000
"""At about 230 bytes for each, they fill a manifest of 48 MiB."""


class MediaFileLimit:
    """Counts the files in `media/` while units are committed. Several units may name the same file."""

    def __init__(self, store: Store):
        self._store = store
        self._at_most = MAX_MEDIA_FILES  # the files of earlier starts are counted with the first ones of this start

    def add(self, files: int) -> None:
        """Count the files that a committed unit names. Raises `TooManyMediaFiles`, `StorageFailed`."""
        if not files:
            return
        self._at_most += files
        if self._at_most <= MAX_MEDIA_FILES:
            return
        self._at_most = len(self._store.names(MEDIA_FOLDER))
        if self._at_most > MAX_MEDIA_FILES:
            raise TooManyMediaFiles(
                f"{self._store.url}: {MEDIA_FOLDER}/",
                found=f"more than {MAX_MEDIA_FILES:,} files",
                wanted=f"at most {MAX_MEDIA_FILES:,}, which one manifest can list",
                fix="choose another output and raise source.images_in_row_bytes, which stores more images in the rows, "
                "or capture parts of the source and merge them",
            )
