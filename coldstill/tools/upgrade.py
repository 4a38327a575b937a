"""`coldstill upgrade`: a header of the newest format over unchanged shards."""

from __future__ import annotations

from pathlib import Path

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import CommitDamaged, FileDamaged
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME
from coldstill.storage_schema.header import FORMAT_VERSION, HEADER_NAME, MAX_HEADER_BYTES, DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, Manifest, read_manifest
from coldstill.storage_schema.repair import header_copy
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER, fingerprint_bytes
from coldstill.storage_schema.verified_files import file_record, read_file, require_size


def upgrade(root: str | Path) -> Dataset:
    """Give the sealed dataset at `root` a header and a manifest of the newest format, in place; its shards stay.

    The dataset gets a new id, and `derived_from` names the old one. What the old format did not record stays unknown.
    A dataset of the newest format is returned as it is. Re-run an interrupted upgrade to resume.

    Raises `DatasetNotFound`, `DatasetNotSealed`, `FileDamaged`, `TokenizerNotFound`, `StorageFailed`,
    `UnsupportedStore`.
    """
    store = Store(root)
    manifest, dataset_id = read_manifest(store)
    if manifest.format_version < FORMAT_VERSION:
        store.require_writable()
        header = _upgraded_header(store, manifest)
        left_out = {FAITHFULNESS_NAME, *manifest.foreign_names}
        files = [file for file in manifest.files if file.name not in left_out]
        records = [file_record(HEADER_NAME, header.to_bytes()) if file.name == HEADER_NAME else file for file in files]
        upgraded = manifest.model_copy(
            update={"format_version": FORMAT_VERSION, "files": tuple(records), "derived_from": (dataset_id,)}
        )
        store.put(HEADER_NAME, header.to_bytes())
        store.put(MANIFEST_NAME, upgraded.to_bytes())
    return open_dataset(root)


def _upgraded_header(store: Store, manifest: Manifest) -> DatasetHeader:
    header = _old_header(store, manifest)
    about = header.about
    for file in manifest.files:
        if file.name == f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}":
            facts = fingerprint_bytes(read_file(store, file), where=f"{store.url}/{file.name}")
            about = about.model_copy(update={"tokenizer_pipeline_sha256": facts.pipeline_sha256})
    return header.newest().model_copy(update={"about": about})


def _old_header(store: Store, manifest: Manifest) -> DatasetHeader:
    """The header before the upgrade. If an upgrade was interrupted after it replaced the file, a shard has its copy."""
    record = next((file for file in manifest.files if file.name == HEADER_NAME), None)
    if record is None:
        raise CommitDamaged(f"{store.url}/{MANIFEST_NAME}: files", found=f"no {HEADER_NAME}", wanted="the header")
    where = f"{store.url}/{HEADER_NAME}"
    try:
        return DatasetHeader.from_bytes(read_file(store, record), where=where)
    except FileDamaged:
        try:
            replaced = DatasetHeader.from_bytes(store.read(HEADER_NAME, at_most=MAX_HEADER_BYTES), where=where)
            first = manifest.shards[0].file
            require_size(store, first)
            copy = DatasetHeader.from_bytes(header_copy(store, first), where=first.name)
        except (ColdstillError, FileNotFoundError, IndexError):
            copy = None
        if copy is None or replaced.format_version == copy.format_version or not replaced.stands_for(copy):
            raise
        return copy
