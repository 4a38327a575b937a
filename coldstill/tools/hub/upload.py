"""A sealed dataset to the Hugging Face Hub, by its own client. A verified local dataset in, a dataset repository out.

Commits of some files each, the last one with the manifest: an upload that was interrupted goes on with the files that
the repository lacks, and is no sealed dataset before its end. (`upload_folder` commits in the order of names, so it
would show `manifest.json` before the shards.) Inside a commit the client does not send again what arrived: files by
their sha256, or with Xet their chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import CredentialsMissing, StorageFailed, UnsupportedStore, named_errors
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.verified_files import FileRecord, file_record
from coldstill.tools.hub.copying import (
    CARD_NAME,
    THREADS,
    Transferred,
    dataset_files,
    manifest_bytes,
    read_card,
)
from coldstill.tools.hub.tree import MAIN, HubPlace, files_there, is_there, require_all, require_no_other_dataset

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_FILES = 64
COMMIT_BYTES = 4 << 30
"""A commit's size: the Hub advises against more than 100 files in one, and what one holds may be asked for again."""


class CardRefused(ColdstillError):
    """The Hub does not take the metadata at the head of the dataset card."""


def upload(dataset: Dataset, place: HubPlace, *, private: bool, progress: bool) -> Transferred:
    """Make the repository, if it is not there, and its branch a copy of `dataset`, which is verified and local.

    Raises `AnotherDataset`, `CredentialsMissing`, `AccessDenied`, `StoreNotFound`, `UnsupportedStore`, `CardRefused`,
    `StorageFailed`.
    """
    if not dataset.store.is_local:
        raise UnsupportedStore(
            dataset.store.url,
            found="a remote store",
            wanted="a local folder",
            fix="`coldstill pull` it into a folder and push that",
        )
    api = _logged_in(place)
    with named_errors(place.url, "writing to the Hub", writes=True), _bars(shown=progress):
        _make_place(api, place, private=private)
        there = files_there(api, place)
        require_no_other_dataset(dataset, place, there)
        files = dataset_files(dataset)
        missing = [file for file in files if not is_there(dataset, file, there)]
        total, to_go = sum(file.bytes for file in files), sum(file.bytes for file in missing)
        with tqdm(
            total=total, initial=total - to_go, unit="B", unit_scale=True, desc="push", disable=not progress
        ) as bar:
            for batch in _batches(missing):
                _commit(
                    api,
                    place,
                    {file.name: str(dataset.store.local_path(file.name)) for file in batch},
                    f"Add {len(batch)} files",
                )
                bar.update(sum(file.bytes for file in batch))
        if missing:
            require_all(dataset, files, place, files_there(api, place))
        last = {MANIFEST_NAME: manifest_bytes(dataset), **read_card(dataset.store)}
        changed: dict[str, str | bytes] = {
            name: data for name, data in last.items() if not is_there(dataset, file_record(name, data), there)
        }
        if changed:  # an empty commit makes the client warn
            _commit(api, place, changed, f"Seal dataset {dataset.dataset_id[:12]}")
    return Transferred(
        dataset_id=dataset.dataset_id,
        files=len(missing),
        bytes=to_go,
        already_there=len(files) - len(missing),
    )


def _logged_in(place: HubPlace) -> HfApi:
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        raise UnsupportedStore(
            place.url, found=str(error), wanted="the Hub's client", fix="pip install 'coldstill[share]'"
        ) from error
    if get_token() is None:
        raise CredentialsMissing(
            place.url,
            found="no token",
            wanted="a token that may write there",
            fix="run `hf auth login`, or set HF_TOKEN",
        )
    return HfApi()


def _make_place(api: HfApi, place: HubPlace, *, private: bool) -> None:
    api.create_repo(place.repo_id, repo_type="dataset", private=private, exist_ok=True)
    if place.revision == MAIN or place.revision.startswith("refs/"):
        return
    if place.revision not in {
        branch.name for branch in api.list_repo_refs(place.repo_id, repo_type="dataset").branches
    }:
        # From the first commit, which holds no dataset: another revision may be another dataset.
        first = api.list_repo_commits(place.repo_id, repo_type="dataset")[-1].commit_id
        api.create_branch(place.repo_id, repo_type="dataset", branch=place.revision, revision=first, exist_ok=True)


def _batches(files: list[FileRecord]) -> Iterator[list[FileRecord]]:
    batch: list[FileRecord] = []
    for file in files:
        if len(batch) == COMMIT_FILES or (batch and sum(f.bytes for f in batch) + file.bytes > COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _commit(api: HfApi, place: HubPlace, files: dict[str, str] | dict[str, str | bytes], message: str) -> None:
    from huggingface_hub import CommitOperationAdd

    try:
        api.create_commit(
            place.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=message,
            repo_type="dataset",
            revision=place.revision,
            num_threads=THREADS,
        )
    except ValueError as error:
        if isinstance(error, OSError):
            raise
        if CARD_NAME not in str(error):  # of the LFS endpoint, in its own words: no room, no right
            raise StorageFailed(
                place.url, found=str(error), wanted="a repository that takes the files", fix="mend it, and push again"
            ) from error
        raise CardRefused(
            f"{place.url}: {CARD_NAME}",
            found=str(error),
            wanted="metadata that the Hub takes",
            fix="make the card anew with `coldstill card`, or mend the lines between its first two `---`",
        ) from error


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """The client's own bars, which show the way of each large file, only where ours are shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
