"""Repair: units whose files are gone or damaged count as not done again, also in a sealed dataset.

The capture that wrote the dataset then makes these units again and seals. Nothing here reads a teacher. All steps can
be repeated, so a repair that is killed is resumed by the next one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import pyarrow as pa

from .commits import (
    FAITHFULNESS_FOLDER,
    REJECTS_FOLDER,
    CommitRecord,
    commit_name,
    committed_units,
    discard_unusable,
    put_unit_file,
    read_commits,
)
from .errors import CommitDamaged, FileDamaged, FileMissing, InvalidHeader, ShardDamaged
from .faithfulness import FAITHFULNESS_NAME, ExactPosition, sample_from_bytes, sample_share, sample_to_bytes
from .header import HEADER_NAME, DatasetHeader
from .manifest import MANIFEST_NAME, Manifest, read_manifest
from .media import media_paths
from .plan import PLAN_NAME
from .rows import MEDIA_FOLDER
from .shard import ShardFile
from .store import Store
from .tokenizer import TOKENIZER_FOLDER
from .verified_files import SHARDS_FOLDER, FileRecord, unusable_files


class Reopened(NamedTuple):
    """What `reopen_damaged` found: the units that must be made again, other files that were lost, and the id of the
    dataset if it was sealed."""

    units: tuple[int, ...] = ()
    files: tuple[str, ...] = ()
    dataset_id: str | None = None


def reopen_damaged(store: Store, *, deep: bool = False) -> Reopened:
    """Make units whose files are gone or damaged count as not done, and unseal the dataset if it has any.

    Sizes are compared, from one listing of each folder. `deep`: digests too, for which all files are read. Of an
    unfinished dataset only the names of shards are compared, because `seal` compares sizes.

    Raises `FileMissing` for a lost file that no capture can make again, `CommitDamaged`, `StorageFailed`.
    """
    if not store.exists(MANIFEST_NAME):
        return Reopened(tuple(_discard_all(store) if deep else _discard_lost_shards(store)))
    try:
        manifest, dataset_id = read_manifest(store)
    except CommitDamaged:
        if not committed_units(store):
            raise
        # The commit records name all other files: sealing writes the manifest again.
        sample = _sample(store)
        for commit in read_commits(store, sorted(committed_units(store))):
            if commit.faithfulness:
                _restore_share(store, commit, sample)
        store.delete(MANIFEST_NAME)
        return Reopened(tuple(_discard_all(store) if deep else ()), (MANIFEST_NAME,))
    shards = {shard.unit: shard.file for shard in manifest.shards}
    bad = unusable_files(store, [*shards.values(), *manifest.files], deep=deep)
    if not bad:
        return Reopened()
    media = _media_of_units(store, manifest, bad)
    _require_remakable(store, bad - {file.name for files in media.values() for file in files})
    lost = frozenset(unit for files in (shards, _rejects(manifest)) for unit, file in files.items() if file.name in bad)
    lost |= {unit for unit in shards if not bad.isdisjoint(file.name for file in media.get(unit, ()))}
    for name in bad:
        store.delete(name)  # from here on their sizes show it
    _restore_files(store, manifest, media=media, lost=lost)
    for unit in lost:
        store.delete(commit_name(unit))
    store.delete(MANIFEST_NAME)
    return Reopened(tuple(sorted(lost)), tuple(sorted(bad)), dataset_id)


def restore_header(store: Store) -> None:
    """Write `dataset.json` again if it is gone or unreadable while units are committed: each shard holds a copy.

    Raises `InvalidHeader` if no shard can be read, `UnsupportedFormat`, `StorageFailed`.
    """
    with suppress(FileNotFoundError, InvalidHeader):
        DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
        return
    done = sorted(committed_units(store))
    for unit in done:
        for commit in read_commits(store, [unit]):
            with suppress(FileNotFoundError, ShardDamaged, InvalidHeader, CommitDamaged):
                store.put(HEADER_NAME, header_copy(store, commit.shard))
                return
    if done:
        raise InvalidHeader(
            f"{store.url}/{HEADER_NAME}",
            found=f"no readable header, here or in a shard of {len(done)} committed units",
            wanted="the header that the capture was started with",
            fix=f"restore {HEADER_NAME} from a copy, or delete {store.url} and capture again",
        )
    store.delete(HEADER_NAME)


def header_copy(store: Store, shard: FileRecord) -> bytes:
    """The copy of the header in a shard's footer. Raises `FileNotFoundError`, `ShardDamaged`, `InvalidHeader`."""
    with store.open(shard.name) as file:
        source = pa.PythonFile(file, mode="r")
        return ShardFile(source, size=store.size(shard.name), codec=None, where=shard.name).header_bytes


def _discard_all(store: Store) -> list[int]:
    before = committed_units(store)
    commits = read_commits(store, sorted(before))
    discard_unusable(store, commits, deep=True)
    return sorted(before - committed_units(store))


def _discard_lost_shards(store: Store) -> list[int]:
    """Every unit has a shard, whose name begins with the unit's number."""
    done = committed_units(store)
    lost = done - {_unit_of(name) for name in store.names(SHARDS_FOLDER)} if done else set()
    return discard_unusable(store, read_commits(store, sorted(lost)))


def _unit_of(name: str) -> int:
    number = name.rpartition("/")[2].partition("-")[0]
    return int(number) if number.isascii() and number.isdigit() else -1


def _media_of_units(store: Store, manifest: Manifest, bad: set[str]) -> dict[int, tuple[FileRecord, ...]]:
    """The media files of each unit whose shard is not among the `bad` files: by its commit record, or by its rows where
    it has none, as in a copied dataset."""
    listed = {file.name: file for file in manifest.files if file.name.startswith(f"{MEDIA_FOLDER}/")}
    if not listed:
        return {}
    done, media = committed_units(store), {}
    for shard in manifest.shards:
        if shard.file.name not in bad:
            record = next(iter(read_commits(store, [shard.unit] if shard.unit in done else [])), None)
            if record is not None and "media" in record.model_fields_set:
                media[shard.unit] = record.media
            else:
                named = _paths(store, shard.file, set(listed))
                media[shard.unit] = tuple(listed[name] for name in sorted(named))
    return media


def _paths(store: Store, shard: FileRecord, listed: set[str]) -> set[str]:
    """Which of the `listed` files the rows of a shard refer to."""
    found: set[str] = set()
    with store.open(shard.name) as file:
        opened = ShardFile(pa.PythonFile(file, mode="r"), size=shard.bytes, codec=None, where=shard.name)
        for group in range(len(opened.group_rows)):
            found |= listed.intersection(media_paths(opened.plain_batch(group)))
    return found


def _require_remakable(store: Store, bad: set[str]) -> None:
    """Raise `FileMissing` for a damaged file that neither a unit nor the start of a capture writes."""
    folders = (SHARDS_FOLDER, REJECTS_FOLDER, TOKENIZER_FOLDER)
    for name in sorted(bad - {HEADER_NAME, PLAN_NAME, FAITHFULNESS_NAME}):
        if not name.startswith(tuple(f"{folder}/" for folder in folders)):
            raise FileMissing(
                f"{store.url}/{name}",
                found="no such file, or other bytes than the manifest names",
                wanted="the file that the manifest names",
                fix="copy it again from where the dataset came from: a capture cannot make it",
            )


def _restore_files(
    store: Store, manifest: Manifest, *, media: dict[int, tuple[FileRecord, ...]], lost: frozenset[int]
) -> None:
    """Give each whole unit again what sealing removed, and a commit record if it has none, as in a copied dataset."""
    done, sample, units = committed_units(store), _sample(store), len(manifest.shards)
    rejects = _rejects(manifest)
    for shard in manifest.shards:
        is_done = shard.unit in done
        if shard.unit in lost or (is_done and not sample_share(shard.unit, units=units)):
            continue
        stored = read_commits(store, [shard.unit]) if is_done else []
        record = CommitRecord(
            unit=shard.unit,
            shard=shard.file,
            rows=shard.rows,
            tokens=shard.tokens,
            targets=shard.targets,
            rejected=shard.rejected,
            rejects=rejects.get(shard.unit),
            media=media.get(shard.unit, ()),
            environment=stored[0].environment if stored else {},
        )
        _restore_share(store, record, sample)


def _restore_share(store: Store, commit: CommitRecord, sample: dict[int, list[ExactPosition]]) -> None:
    """Write a unit's share of the faithfulness sample, and its record. Where the sample is lost, the unit keeps its
    shard without it."""
    share = None
    if positions := sample.get(commit.unit):
        data = sample_to_bytes(positions)
        share = put_unit_file(store, commit.unit, data, folder=FAITHFULNESS_FOLDER, ending="parquet")
    store.put(commit_name(commit.unit), commit.model_copy(update={"faithfulness": share}).to_bytes())


def _rejects(manifest: Manifest) -> dict[int, FileRecord]:
    return {_unit_of(file.name): file for file in manifest.files if file.name.startswith(f"{REJECTS_FOLDER}/")}


def _sample(store: Store) -> dict[int, list[ExactPosition]]:
    """The faithfulness sample by unit; empty if it is gone or damaged."""
    by_unit: dict[int, list[ExactPosition]] = {}
    with suppress(FileNotFoundError, FileDamaged):
        for position in sample_from_bytes(store.read(FAITHFULNESS_NAME), where=FAITHFULNESS_NAME):
            by_unit.setdefault(position.unit, []).append(position)
    return by_unit
