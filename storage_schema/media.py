"""`MediaReference`: an image (or other medium) that stands behind one placeholder token of a row.

Positions of a row are counted in the sequence with ONE placeholder token per medium: teacher and student each expand it
in their own way. A medium is either in the row itself (`data`) or a file of the dataset (`path`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InvalidRow

MEDIA_FOLDER = "media"
MAX_MEDIA_BYTES = 64 << 20
MAX_MEDIA = 4096
"""References of one row."""

_TYPE = re.compile(r"[a-z]+/[a-z0-9][a-z0-9.+-]*")
_PATH = re.compile(rf"{MEDIA_FOLDER}/[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class MediaReference:
    """`position`: index of the placeholder in the row's `token_ids`. `type`: MIME type. `sha256`: of the content.

    Either `data`, the content, or `path`, a file of the dataset directly in `media/`.
    """

    position: int
    type: str
    sha256: str
    path: str | None = None
    data: bytes | None = None


def check_media(sample_id: str, media: Sequence[MediaReference], *, tokens: int) -> None:
    """Raise `InvalidRow` unless every reference is whole and its content is what its digest says."""
    if len(media) > MAX_MEDIA:
        raise InvalidRow(f"row {sample_id!r}: media", found=len(media), wanted=f"at most {MAX_MEDIA}")
    before = -1
    for number, item in enumerate(media):
        where = f"row {sample_id!r}: media {number}"
        if not before < item.position < tokens:
            raise InvalidRow(f"{where}: position", found=item.position, wanted=f"ascending positions below {tokens}")
        before = item.position
        if not _TYPE.fullmatch(item.type):
            raise InvalidRow(f"{where}: type", found=repr(item.type[:80]), wanted="a MIME type, as image/png")
        if (item.path is None) == (item.data is None):
            raise InvalidRow(where, found="a path and data, or neither", wanted="one of path and data")
        if item.path is not None and not _PATH.fullmatch(item.path):
            raise InvalidRow(f"{where}: path", found=repr(item.path[:80]), wanted=f"a file in {MEDIA_FOLDER}/")
        if item.data is not None:
            _check_data(where, item)


def _check_data(where: str, item: MediaReference) -> None:
    assert item.data is not None
    if len(item.data) > MAX_MEDIA_BYTES:
        raise InvalidRow(f"{where}: data", found=f"{len(item.data)} bytes", wanted=f"at most {MAX_MEDIA_BYTES}")
    digest = hashlib.sha256(item.data).hexdigest()
    if digest != item.sha256:
        raise InvalidRow(f"{where}: sha256", found=item.sha256[:64], wanted=digest)
