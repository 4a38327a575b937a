"""Deep checks of media for `coldstill verify`: each content's digest and type, and the files that no row needs."""

from __future__ import annotations

from collections.abc import Iterator

from coldstill.common.errors import ColdstillError
from coldstill.common.images import ENDINGS, FIRST_BYTES, type_of_first_bytes
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileDamaged, FileMissing
from coldstill.storage_schema.rows import MAX_MEDIA_BYTES, MEDIA_FOLDER, CachedRow, MediaReference
from coldstill.storage_schema.verified_files import FileRecord, check_content, open_file

from .errors import MediaTypeWrong, MediaUnused


class MediaChecks:
    """Checks the files, several at a time, and then the media of rows, one after the other.

    A type is compared with the content's first bytes, without PIL. A dataset whose header has the placeholder of images
    holds what a teacher was shown, so there a type that is not read is wrong too.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._files = {file.name: file for file in dataset.manifest.files if file.name.startswith(f"{MEDIA_FOLDER}/")}
        processor = dataset.header.about.processor
        self._holds_images = processor is not None and processor.image_token_id is not None
        self._types: dict[str, str | None] = {}
        """By whole file, the type of its first bytes: each file is read once."""
        self._used: set[str] = set()

    def check_file(self, file: FileRecord) -> None:
        """Verifies a file, one block in memory at a time. Raises `FileMissing`, `FileDamaged`."""
        if file.bytes > MAX_MEDIA_BYTES:
            raise FileDamaged(f"{file.name}: size", found=f"{file.bytes} bytes", wanted=f"at most {MAX_MEDIA_BYTES}")
        with open_file(self._dataset.store, file) as opened:
            shown = type_of_first_bytes(opened.read(FIRST_BYTES))
            opened.seek(0)
            check_content(self._dataset.store, file, opened)
        self._types[file.name] = shown

    def check_row(self, row: CachedRow) -> None:
        """Raises `FileMissing`, `FileDamaged`, `MediaTypeWrong` for the first wrong medium of a row.

        The files must have been checked before. The digest of content in the row is compared when the row is decoded.
        """
        for item in row.media:
            where = f"row {row.sample_id!r}: media {item.path or item.sha256}"
            if item.data is not None:
                shown = type_of_first_bytes(item.data)
            elif (file := self._file_of(item, where)).name in self._types:
                shown = self._types[file.name]
            else:
                continue  # the file has its own finding
            if shown != item.type and (shown is not None or self._holds_images):
                raise MediaTypeWrong(
                    f"{where}: type",
                    found=f"{item.type}, where the first bytes are those of {shown or 'no image'}",
                    wanted=" or ".join(ENDINGS),
                )

    def unused(self) -> Iterator[ColdstillError]:
        """One error for each file that no row refers to, after all rows were checked."""
        for name in self._files:
            if name not in self._used:
                yield MediaUnused(
                    name,
                    found="no row that refers to it",
                    wanted=f"in {MEDIA_FOLDER}/ only what rows refer to",
                    fix="`coldstill subset SOURCE OUTPUT` makes a dataset of the same rows without this file",
                )

    def _file_of(self, item: MediaReference, where: str) -> FileRecord:
        file = self._files.get(item.path or "")
        if file is None:
            raise FileMissing(where, found="no such file", wanted="a file that the manifest lists")
        if item.sha256 != file.sha256:
            raise FileDamaged(where, found=f"sha256 {file.sha256}", wanted=item.sha256[:64])
        self._used.add(file.name)
        return file
