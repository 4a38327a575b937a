"""What a dataset repository on the Hub holds. An address in, the files with their digests out, and how they compare."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import StorageFailed, UnsupportedStore
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.verified_files import FileRecord, file_record
from coldstill.tools.hub.copying import AnotherDataset, manifest_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"

_PLACE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+))?")


class HubPlace(NamedTuple):
    """A dataset repository, and the branch of it."""

    repo_id: str
    revision: str

    @property
    def url(self) -> str:
        """As the user writes it."""
        return f"hf://datasets/{self.repo_id}" + ("" if self.revision == MAIN else f"@{self.revision}")


class RemoteEntry(NamedTuple):
    """What the Hub says of a file: its size, and the sha256 of a large file or the git id of a small one."""

    size: int
    digest: str


def hub_place(url: str) -> HubPlace:
    """The place that `hf://datasets/ORG/NAME[@REVISION]` names. Raises `UnsupportedStore`."""
    match = _PLACE.fullmatch(url.rstrip("/"))
    if match is None:
        raise UnsupportedStore(
            url,
            found="no address of a dataset repository",
            wanted="hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION",
            fix="check the address; a dataset has a repository of its own, not a folder of one",
        )
    return HubPlace(match[1], match[2] or MAIN)


def files_there(api: HfApi, place: HubPlace) -> dict[str, RemoteEntry]:
    """All files of the branch, from its tree alone."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(place.repo_id, repo_type="dataset", revision=place.revision, recursive=True)
    return {
        file.path: RemoteEntry(file.size, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in tree
        if isinstance(file, RepoFile)
    }


def require_no_other_dataset(dataset: Dataset, place: HubPlace, there: dict[str, RemoteEntry]) -> None:
    """Raise `AnotherDataset` unless the branch is empty, or a copy of this dataset, whole or not."""
    header = next(file for file in dataset.manifest.files if file.name == HEADER_NAME)
    for file in (file_record(MANIFEST_NAME, manifest_bytes(dataset)), header):
        if file.name in there and not is_there(dataset, file, there):
            raise AnotherDataset(
                place.url,
                found=f"another {file.name}",
                wanted=f"nothing, or a copy of {dataset.dataset_id}",
                fix=f"choose another name, or another revision: hf://datasets/{place.repo_id}@REVISION",
            )


def is_there(dataset: Dataset, file: FileRecord, there: dict[str, RemoteEntry]) -> bool:
    """Whether the branch holds this file of a local dataset, right in size and digest."""
    remote = there.get(file.name)
    if remote is None or remote.size != file.bytes:
        return False
    if len(remote.digest) == len(file.sha256):
        return remote.digest == file.sha256
    data = dataset.store.read(file.name)  # what the Hub keeps in git is small
    return remote.digest == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def require_all(dataset: Dataset, files: list[FileRecord], place: HubPlace, there: dict[str, RemoteEntry]) -> None:
    """Raise `StorageFailed` unless all `files` are there: a repository may ignore some without a word."""
    refused = [file.name for file in files if not is_there(dataset, file, there)]
    if refused:
        raise StorageFailed(
            place.url,
            found=f"{len(refused)} files that did not arrive, the first is {refused[0]}",
            wanted="all files of the dataset",
            fix="remove the repository's .gitignore, if it has one, and push again",
        )
