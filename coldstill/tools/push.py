"""`coldstill push`: publishes a sealed dataset on the Hub, or copies it to another store.

On the Hub, files are uploaded in several commits by the Hub's own client, and the manifest in the last one. Re-run an
interrupted push to resume: only files that the repository lacks are uploaded. Until its last commit, the repository is
not a sealed dataset. (The client's `upload_folder` commits in the order of names, so `manifest.json` would appear
before the shards.) Within a commit, the client skips what was already uploaded: whole files by sha256, or Xet chunks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstill.common.packages import require_packages
from coldstill.common.progress import tqdm
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import (
    CredentialsMissing,
    FileDamaged,
    StorageFailed,
    UnsupportedStore,
    named_errors,
)
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.rows import MEDIA_FOLDER
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import FileRecord, file_record

from .card.pushed import card_on_hub, made_card
from .card_text import CARD_NAME, MAX_CARD_BYTES
from .errors import AnotherDataset, CardRefused
from .pull import (
    THREADS,
    Result,
    TransferResult,
    copy_dataset,
    dataset_files,
    manifest_bytes,
    other_names,
    read_unlisted,
    retried,
)
from .verify import verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_FILES = 64
COMMIT_BYTES = 4 << 30
"""Limits of one commit. The Hub advises at most 100 files, and an interrupted commit is uploaded again."""
COMMIT_MEDIA_FILES = 1024
"""Media files are small, and there can be 200,000, which would be 3,000 commits of 64."""

MAIN = "main"

_HUB_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+))?")


class HubRepo(NamedTuple):
    """A branch of a dataset repository on the Hub."""

    repo_id: str
    revision: str

    @property
    def url(self) -> str:
        """The URL as the user writes it."""
        return f"hf://datasets/{self.repo_id}" + ("" if self.revision == MAIN else f"@{self.revision}")


class RemoteFile(NamedTuple):
    """The Hub's record of a file: its size, and the sha256 of a large file or the git id of a small one."""

    size: int
    digest: str


def push(
    root: str | Path, destination: str, *, private: bool = True, replace: bool = False, progress: bool = True
) -> TransferResult:
    """Publish the sealed dataset at `root`, after verifying it, under `destination`.

    `hf://datasets/ORG/NAME[@REVISION]` is created if it does not exist (`private` or public); any other URL or path is
    a folder of a store. Only the files that the manifest lists, `manifest.json` and the card are copied. The copy of a
    dataset without a card gets a generated one, if there is no card yet. `replace` overwrites a card that someone
    edited, and on the Hub removes whatever else the branch holds. What fails temporarily is tried again.

    Raises `DatasetNotFound`, `DatasetNotSealed`, `FileDamaged`, `ForeignFile`, `AnotherDataset`, `CardExists`,
    `PackagesMissing`, `CredentialsMissing`, `AccessDenied`, `StoreNotFound`, `UnsupportedStore`, `CardRefused`,
    `StorageFailed`.
    """
    dataset = retried(open_dataset, root)
    if destination.startswith("hf://"):
        repo = parse_hub_url(destination)
        _hub_client(dataset, repo)  # a missing login ends the push before a large dataset is read
        _require_intact(dataset, progress=progress)
        return upload(dataset, repo, private=private, replace=replace, progress=progress)
    store = Store(destination)
    if store.is_local:
        store.require_usable()
    _require_intact(dataset, progress=progress)
    make = partial(made_card, dataset, progress=progress)
    return copy_dataset(dataset, store, progress=progress, replace_card=replace, make_card=make)


def upload(dataset: Dataset, repo: HubRepo, *, private: bool, replace: bool = False, progress: bool) -> TransferResult:
    """Create the repository if it does not exist, and make its branch a copy of `dataset`, a verified local dataset.

    Raises `AnotherDataset`, `CardExists`, `PackagesMissing`, `CredentialsMissing`, `AccessDenied`, `StoreNotFound`,
    `UnsupportedStore`, `CardRefused`, `StorageFailed`.
    """
    api = _hub_client(dataset, repo)
    with _client_bars(shown=progress):
        _request(repo, _create_repo, api, repo, private=private)
        remote = _request(repo, _remote_files, api, repo)
        files = dataset_files(dataset)
        last = {MANIFEST_NAME: manifest_bytes(dataset), **read_unlisted(dataset)}
        if replace:
            remote = _without_others(api, repo, remote, kept={*last, CARD_NAME, *(file.name for file in files)})
        else:
            _require_no_other_dataset(dataset, repo, remote)
        last = card_on_hub(
            dataset,
            last,
            partial(_request, repo, _read_card, repo) if CARD_NAME in remote else None,
            same=CARD_NAME in last and _is_same(file_record(CARD_NAME, last[CARD_NAME]), last.__getitem__, remote),
            replace=replace,
            where=repo.url,
            progress=progress,
        )
        missing = [file for file in files if not _is_same(file, dataset.store.read, remote)]
        total, missing_bytes = sum(file.bytes for file in files), sum(file.bytes for file in missing)
        with tqdm(
            total=total, initial=total - missing_bytes, unit="B", unit_scale=True, desc="push", disable=not progress
        ) as bar:
            for batch in _batches(missing):
                content: dict[str, str | bytes] = {
                    file.name: str(dataset.store.local_path(file.name)) for file in batch
                }
                _request(repo, _commit, api, repo, content, f"Add {len(batch)} files", bar=bar)
                bar.update(sum(file.bytes for file in batch))
        if missing:
            _require_all_uploaded(dataset, files, repo, _request(repo, _remote_files, api, repo))
        changed: dict[str, str | bytes] = {
            name: data for name, data in last.items() if not _is_same(file_record(name, data), last.__getitem__, remote)
        }
        if changed:  # the client warns about an empty commit
            _request(repo, _commit, api, repo, changed, f"Seal dataset {dataset.dataset_id[:12]}")
    return TransferResult(
        dataset_id=dataset.dataset_id,
        files=len(missing),
        bytes=missing_bytes,
        already_there=len(files) - len(missing),
    )


def _request(
    repo: HubRepo, call: Callable[..., Result], *arguments: Any, bar: tqdm | None = None, **options: Any
) -> Result:
    """The result of a call to the Hub's client, which is repeated while it fails temporarily."""

    def attempt() -> Result:
        with named_errors(repo.url, "writing to the Hub", writes=True):
            return call(*arguments, **options)

    return retried(attempt, bar=bar)


def _read_card(repo: HubRepo) -> bytes:
    store = Store(repo.url)
    store.fs.invalidate_cache()
    try:
        return store.read(CARD_NAME, at_most=MAX_CARD_BYTES)
    finally:
        store.fs.invalidate_cache()  # the listing is that of before the push


def _without_others(
    api: HfApi, repo: HubRepo, remote: dict[str, RemoteFile], *, kept: set[str]
) -> dict[str, RemoteFile]:
    """Remove the files that a copy of the dataset does not have, and what remains. The branch's history keeps them.

    Header and manifest of another dataset go in the same commit: the branch never holds a mixture under its manifest.
    """
    from huggingface_hub import CommitOperationDelete

    others = [name for name in remote if name not in kept and not name.startswith((".", "LICENSE"))]
    gone = [*others, *({MANIFEST_NAME} & remote.keys() if others else ())]
    if gone:
        _request(
            repo,
            api.create_commit,
            repo.repo_id,
            [CommitOperationDelete(path_in_repo=name) for name in gone],
            commit_message=f"Remove {len(gone)} files that are replaced",
            repo_type="dataset",
            revision=repo.revision,
        )
    return {name: file for name, file in remote.items() if name not in gone}


def parse_hub_url(url: str) -> HubRepo:
    """The branch that `hf://datasets/ORG/NAME[@REVISION]` names. Raises `UnsupportedStore`."""
    match = _HUB_URL.fullmatch(url.rstrip("/"))
    if match is None:
        raise UnsupportedStore(
            url,
            found="not the URL of a dataset repository",
            wanted="hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION",
            fix="check the URL; a dataset needs its own repository, not a folder in one",
        )
    return HubRepo(match[1], match[2] or MAIN)


def _require_intact(dataset: Dataset, *, progress: bool) -> None:
    findings = verify(dataset.store.url, progress=progress)
    if findings:
        raise FileDamaged(
            dataset.store.url,
            found=f"{len(findings)} findings, the first: {findings[0].error} in {findings[0].where}",
            wanted="a dataset without findings",
            fix="run `coldstill verify` to list them all",
        )


def _hub_client(dataset: Dataset, repo: HubRepo) -> HfApi:
    """The Hub's client. Raises what a push of `dataset` lacks before any request."""
    if not dataset.store.is_local:
        raise UnsupportedStore(
            dataset.store.url,
            found="a remote store",
            wanted="a local folder",
            fix="`coldstill pull` it into a folder and push that",
        )
    require_packages("share", "huggingface_hub")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise CredentialsMissing(
            repo.url,
            found="no token",
            wanted="a token with write access",
            fix="run `hf auth login`, or set HF_TOKEN",
        )
    return HfApi()


def _create_repo(api: HfApi, repo: HubRepo, *, private: bool) -> None:
    """Create the repository and the branch, unless they exist."""
    api.create_repo(repo.repo_id, repo_type="dataset", private=private, exist_ok=True)
    if repo.revision == MAIN or repo.revision.startswith("refs/"):
        return
    if repo.revision not in {branch.name for branch in api.list_repo_refs(repo.repo_id, repo_type="dataset").branches}:
        # Branch from the first commit, which holds no dataset: another revision may hold another dataset.
        first = api.list_repo_commits(repo.repo_id, repo_type="dataset")[-1].commit_id
        api.create_branch(repo.repo_id, repo_type="dataset", branch=repo.revision, revision=first, exist_ok=True)


def _remote_files(api: HfApi, repo: HubRepo) -> dict[str, RemoteFile]:
    """All files of the branch by name, from a listing of its tree; no file is downloaded."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo.repo_id, repo_type="dataset", revision=repo.revision, recursive=True)
    return {
        file.path: RemoteFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in tree
        if isinstance(file, RepoFile)
    }


def _require_no_other_dataset(dataset: Dataset, repo: HubRepo, remote: dict[str, RemoteFile]) -> None:
    """Raise `AnotherDataset` unless the branch is empty, or a finished or unfinished copy of this dataset.

    A repository that was made on the Hub's page is empty if it has a card and a license only.
    """
    header = next(file for file in dataset.manifest.files if file.name == HEADER_NAME)
    found = ""
    for file in (file_record(MANIFEST_NAME, manifest_bytes(dataset)), header):
        if file.name in remote and not _is_same(file, dataset.store.read, remote):
            found = found or f"another {file.name}"
    tops = {name.partition("/")[0] for name in remote}
    if not found and HEADER_NAME not in remote and (others := other_names(dataset, tops)):
        found = f"{len(others)} other files or folders, such as {others[0]}"
    if found:
        raise AnotherDataset(
            repo.url,
            found=found,
            wanted=f"nothing, or a copy of {dataset.dataset_id}",
            fix=f"choose another name, or another revision: hf://datasets/{repo.repo_id}@REVISION. Or pass --replace "
            "to remove what the branch holds; its history keeps it",
        )


def _is_same(file: FileRecord, read: Callable[[str], bytes], remote: dict[str, RemoteFile]) -> bool:
    """Whether the branch holds a file with this content. `read` of its name is called only for a file that the Hub
    keeps in git, as it does with small ones."""
    found = remote.get(file.name)
    if found is None or found.size != file.bytes:
        return False
    if len(found.digest) == len(file.sha256):
        return found.digest == file.sha256
    data = read(file.name)
    return found.digest == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _require_all_uploaded(
    dataset: Dataset, files: list[FileRecord], repo: HubRepo, remote: dict[str, RemoteFile]
) -> None:
    """Raise `StorageFailed` unless the branch holds all `files`: a repository may silently ignore some."""
    absent = [file.name for file in files if not _is_same(file, dataset.store.read, remote)]
    if absent:
        raise StorageFailed(
            repo.url,
            found=f"{len(absent)} files are missing after the upload, the first is {absent[0]}",
            wanted="all files of the dataset",
            fix="remove the repository's .gitignore, if it has one, and push again",
        )


def _batches(files: list[FileRecord]) -> Iterator[list[FileRecord]]:
    batch: list[FileRecord] = []
    size = 0
    for file in files:
        is_medium = file.name.startswith(f"{MEDIA_FOLDER}/")
        most = COMMIT_MEDIA_FILES if is_medium else COMMIT_FILES
        if batch and (len(batch) >= most or size + file.bytes > COMMIT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.bytes
    if batch:
        yield batch


def _commit(api: HfApi, repo: HubRepo, files: dict[str, str] | dict[str, str | bytes], message: str) -> None:
    from huggingface_hub import CommitOperationAdd

    try:
        api.create_commit(
            repo.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=message,
            repo_type="dataset",
            revision=repo.revision,
            num_threads=THREADS,
        )
    except ValueError as error:
        if isinstance(error, OSError):
            raise
        if CARD_NAME not in str(error):  # the LFS endpoint reports a full quota or a missing right as text
            raise StorageFailed(
                repo.url,
                found=str(error),
                wanted="a repository that accepts the files",
                fix="fix what the Hub reports, and push again",
            ) from error
        raise CardRefused(
            f"{repo.url}: {CARD_NAME}",
            found=str(error),
            wanted="metadata that the Hub accepts",
            fix="write a new card with `coldstill card --replace`, or correct the lines between its first two `---`",
        ) from error


@contextmanager
def _client_bars(*, shown: bool) -> Iterator[None]:
    """Hide the client's own progress bars, one per large file, unless ours are shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
