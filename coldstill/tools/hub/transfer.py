"""`coldstill push` and `coldstill pull`: a sealed dataset to and from the Hugging Face Hub or any store.

Paths and URLs in, a second copy with the same id out. Both can be interrupted at any moment and started again.
"""

from __future__ import annotations

from pathlib import Path

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import FileDamaged, UnsupportedStore
from coldstill.storage_schema.store import Store
from coldstill.tools.hub.copying import Transferred, copy_dataset
from coldstill.tools.verify import verify


def push(root: str | Path, destination: str, *, private: bool = True, progress: bool = True) -> Transferred:
    """Publish the sealed dataset at `root`, after verifying it, under `destination`.

    `hf://datasets/ORG/NAME[@REVISION]` is made if it is not there (`private` says how); any other URL or path is a
    folder of a store. Only files that the manifest names go, with `manifest.json` and the card.

    Raises `DatasetNotFound`, `DatasetNotSealed`, `FileDamaged`, `AnotherDataset`, `CredentialsMissing`, `AccessDenied`,
    `StoreNotFound`, `UnsupportedStore`, `StorageFailed`.
    """
    dataset = open_dataset(root)
    _require_whole(dataset, progress=progress)
    if destination.startswith("hf://"):
        from coldstill.tools.hub.tree import hub_place
        from coldstill.tools.hub.upload import upload

        return upload(dataset, hub_place(destination), private=private, progress=progress)
    return copy_dataset(dataset, Store(destination), progress=progress)


def pull(source: str | Path, folder: str | Path, *, progress: bool = True) -> Transferred:
    """Mirror the sealed dataset at `source`, a path or any URL, into a local folder, verifying every file.

    Pulled again, a folder is mended where its files are not right.

    Raises `DatasetNotFound`, `DatasetNotSealed`, `FileMissing`, `FileDamaged`, `AnotherDataset`, `StoreNotFound`,
    `StorageFull`, `StorageFailed`, `UnsupportedStore`.
    """
    if "://" in str(folder):
        raise UnsupportedStore(
            str(folder), found="a URL", wanted="a local folder", fix="`coldstill push` copies to other stores"
        )
    return copy_dataset(open_dataset(source), Store(folder), progress=progress)


def _require_whole(dataset: Dataset, *, progress: bool) -> None:
    findings = verify(dataset.store.url, progress=progress)
    if findings:
        raise FileDamaged(
            dataset.store.url,
            found=f"{len(findings)} findings, the first: {findings[0].error} in {findings[0].where}",
            wanted="a dataset whose files are all right",
            fix="run `coldstill verify` to see them all",
        )
