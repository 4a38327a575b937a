"""Media of rows: which content is stored in the row, which in a file, and how files are written.

A file is named by its content, `media/SHA256.ENDING`, so equal content of several rows and units is one file. A unit
writes its files before its commit record, which lists them. No attempt deletes a file in `media/`: another unit may
name it. Sealing removes the files that no record names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from coldstill.common.images import ENDINGS
from coldstill.common.models import MAX_DOCUMENT_BYTES

from .errors import CommitDamaged, FileDamaged, FileMissing, TooManyMedia
from .rows import MAX_MEDIA_BYTES, MEDIA_FOLDER, CachedRow, MediaReference, check_media
from .store import Store
from .verified_files import FileRecord, check_file, file_record

MAX_IN_ROW_BYTES = 128 << 20
"""Media of one row that are stored in it. With its targets the row fits the largest row group, 256 MiB."""
MAX_MEDIA_FILES = 200_000
"""A file takes 215 bytes of the manifest, a unit with rejects 492: this many files leave room for 14,000 units."""

_OUR_NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,8}")
_WRITERS = 8
_COUNTED_EVERY = 32
"""Units between two counts of the media files: an object store lists 1,000 names per request."""


class PlacedMedia(NamedTuple):
    """Rows whose larger media are paths, and the content of these files by name."""

    rows: list[CachedRow]
    files: dict[str, bytes]


def place_media(rows: Sequence[CachedRow], *, in_row_bytes: int | None) -> PlacedMedia:
    """Media of more than `in_row_bytes` as files, the others in their rows (None: all that a row can hold).

    Raises `InvalidRow` for a reference that is not complete, or whose content has another digest.
    """
    placed = PlacedMedia([], {})
    for row in rows:
        if not row.media:
            placed.rows.append(row)
            continue
        check_media(row.sample_id, row.media, tokens=row.token_ids.size)
        most, in_row = MAX_MEDIA_BYTES if in_row_bytes is None else in_row_bytes, 0
        media = list(row.media)
        for number, item in enumerate(row.media):
            if item.data is None:
                continue
            if len(item.data) <= most and in_row + len(item.data) <= MAX_IN_ROW_BYTES:
                in_row += len(item.data)
            else:
                media[number] = replace(item, path=media_name(item), data=None)
                placed.files[media_name(item)] = item.data
        placed.rows.append(replace(row, media=tuple(media)))
    return placed


def media_name(item: MediaReference) -> str:
    """The name of the file that holds the content of `item`."""
    return f"{MEDIA_FOLDER}/{item.sha256}.{ENDINGS.get(item.type, 'bin')}"


def is_own_name(last: str) -> bool:
    """Whether a file directly in `media/` has a name that `media_name` gives. Only such files are ever removed."""
    return _OUR_NAME.fullmatch(last) is not None


def put_media(store: Store, files: Mapping[str, bytes]) -> tuple[FileRecord, ...]:
    """Write the files that are not there whole, and return the records of all, by name. Raises `StorageFailed`."""
    records = {name: file_record(name, files[name]) for name in sorted(files)}
    with ThreadPoolExecutor(_WRITERS) as writers:
        for _ in writers.map(partial(_put, store), records.values(), (files[name] for name in records)):
            pass
    return tuple(records.values())


def _put(store: Store, record: FileRecord, data: bytes) -> None:
    try:
        check_file(store, record)
    except (FileMissing, FileDamaged, CommitDamaged):  # the last for a link that leaves the dataset
        store.put(record.name, data)


def stored_media(store: Store, rows: Iterable[CachedRow], *, written: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
    """The records of all files that the rows refer to, by name: those `written` just now, and verified older ones.

    Raises `FileMissing`, `FileDamaged`.
    """
    records = {file.name: file for file in written}
    for row in rows:
        for item in row.media:
            if item.path is not None and item.path not in records:
                try:
                    size = store.size(item.path)
                except FileNotFoundError:
                    where = f"row {row.sample_id!r}: media {item.path}"
                    raise FileMissing(where, found="no such file", wanted="a file of the dataset") from None
                records[item.path] = FileRecord(name=item.path, bytes=size, sha256=item.sha256)
                check_file(store, records[item.path])
    return tuple(records[name] for name in sorted(records))


def media_paths(batch: pa.RecordBatch) -> list[str]:
    """The different paths that the rows of a row group refer to, in order of first use."""
    # As bytes, and not as text: a stranger's path need not be UTF-8.
    paths = pc.struct_field(batch.column("media").flatten(), "path").cast(pa.binary())
    return [path.decode(errors="replace") for path in pc.unique(paths).drop_null().to_pylist()]


def require_room(*, units: int, media: int, where: str) -> None:
    """Raises `TooManyMedia` if a manifest cannot list this many units and media files."""
    if 492 * units + 215 * media > MAX_DOCUMENT_BYTES or media > MAX_MEDIA_FILES:
        raise TooManyMedia(
            where,
            found=f"{media:,} files in {MEDIA_FOLDER}/",
            wanted=f"at most {MAX_MEDIA_FILES:,}, fewer with many units",
        )


def count_now_and_then(store: Store, unit: int) -> None:
    """Raises `TooManyMedia` while a capture runs, and not hours later at sealing. Counts at some units only."""
    if unit % _COUNTED_EVERY == 0:
        require_room(units=0, media=len(store.names(MEDIA_FOLDER)), where=store.url)
