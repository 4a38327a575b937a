"""Deep checks of media for `coldstill verify`: each content's digest and type, and the files that no row needs."""

from __future__ import annotations

from collections.abc import Iterator

from coldstill.common.errors import ColdstillError
from coldstill.common.images import ENDINGS, FIRST_BYTES, type_of_first_bytes
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileDamaged, FileMissing
from coldstill.storage_schema.rows import MAX_MEDIA_BYTES, MEDIA_FOLDER, CachedRow, MediaReference
from coldstill.storage_schema.verified_files import FileRecord, require_size

from .errors import MediaTypeWrong, MediaUnused


class MediaChecks:
    """Checks the media of rows one after the other. The digests of files are compared elsewhere, once for each file.

    A type is compared with the content's first bytes, without PIL. A dataset whose header has the placeholder of images
    holds what a teacher was shown, so there a type that is not read is wrong too.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._files = {file.name: file for file in dataset.manifest.files if file.name.startswith(f"{MEDIA_FOLDER}/")}
        processor = dataset.header.about.processor
        self._holds_images = processor is not None and processor.image_token_id is not None
        self._types: dict[str, str | None] = {}
        """By file, the type of its first bytes: a file is opened once. As many entries as the manifest lists."""

    def check_row(self, row: CachedRow) -> None:
        """Raises `FileMissing`, `FileDamaged`, `MediaTypeWrong` for the first wrong medium of a row.

        The digest of content in the row is compared when the row is decoded.
        """
        for item in row.media:
            where = f"row {row.sample_id!r}: media {item.path or item.sha256}"
            shown = type_of_first_bytes(item.data) if item.data is not None else self._type_of_file(item, where)
            if shown != item.type and (shown is not None or self._holds_images):
                raise MediaTypeWrong(
                    f"{where}: type",
                    found=f"{item.type}, where the first bytes are those of {shown or 'no image'}",
                    wanted=" or ".join(ENDINGS),
                )

    def unused(self) -> Iterator[ColdstillError]:
        """One error for each file that no row refers to, after all rows were checked."""
        for name in self._files:
            if name not in self._types:
                yield MediaUnused(
                    name,
                    found="no row that refers to it",
                    wanted=f"in {MEDIA_FOLDER}/ only what rows refer to",
                    fix="`coldstill subset SOURCE OUTPUT` makes a dataset of the same rows without this file",
                )

    def _type_of_file(self, item: MediaReference, where: str) -> str | None:
        file = self._files.get(item.path or "")
        if file is None:
            raise FileMissing(where, found="no such file", wanted="a file that the manifest lists")
        if item.sha256 != file.sha256:
            raise FileDamaged(where, found=f"sha256 {file.sha256}", wanted=item.sha256[:64])
        if file.name not in self._types:
            self._types[file.name] = self._first_bytes(file, where)
        return self._types[file.name]

    def _first_bytes(self, file: FileRecord, where: str) -> str | None:
        if file.bytes > MAX_MEDIA_BYTES:
            raise FileDamaged(f"{where}: size", found=f"{file.bytes} bytes", wanted=f"at most {MAX_MEDIA_BYTES}")
        require_size(self._dataset.store, file)
        with self._dataset.store.open(file.name) as opened:
            return type_of_first_bytes(opened.read(FIRST_BYTES))
