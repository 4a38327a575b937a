"""Shared by merge, split and subset: plans and commits a new sealed dataset.

The request (command, sources, options) is written before the first unit and into each commit record. Re-run the same
command to resume: units with a commit record are not made again. A different request is rejected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pydantic import JsonValue, ValidationError

from coldstill.common.models import FrozenModel, parse_document
from coldstill.common.progress import tqdm
from coldstill.storage_schema.commits import (
    COMMITS_FOLDER,
    FAITHFULNESS_FOLDER,
    REJECTS_FOLDER,
    commit_files,
    commit_name,
    committed_units,
    read_commit,
)
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.faithfulness import sample_to_bytes
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, read_manifest, seal
from coldstill.storage_schema.media import put_media, require_room
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.rows import MEDIA_FOLDER
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import SHARDS_FOLDER, FileRecord
from coldstill.tools.errors import NothingSelected, OutputNotApart, OutputTaken

from .sources import Sources
from .units import Select, make_unit

_COPIERS = 4
"""Media files in memory at once, each of at most 64 MiB."""
REQUEST_NAME = f"{RUN_FOLDER}/derivation.json"


class Request(FrozenModel):
    """A command with the ids of its sources, in order, and its options."""

    command: str
    sources: tuple[str, ...]
    options: dict[str, JsonValue]


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """How to make a new dataset. `select`: which rows to take; None takes all shards with their rejects."""

    request: Request
    sources: Sources
    header: DatasetHeader
    select: Select | None
    make_plan: Callable[[], list[Unit]]


def derive(output: str | Path, derivation: Derivation, *, progress: bool) -> Dataset:
    """Make the sealed dataset at `output`: start it, resume it, or return the finished one.

    Raises `OutputTaken`, `OutputNotApart`, `HeaderMismatch` if it was started with another header, `NothingSelected`,
    `UnsupportedStore`, `StorageFailed`, `TokenizerMismatch`, and what reading a damaged source raises.
    """
    store = open_output(output, derivation.sources)
    if store.exists(MANIFEST_NAME):
        _require_same(store, _sealed_request(store), derivation.request)
    else:
        _begin(store, derivation)
        _make_units(store, derivation, progress)
    seal(store, derived_from=derivation.sources.ids)
    return open_dataset(store.url)


def _begin(store: Store, derivation: Derivation) -> None:
    """Write request, header, tokenizer and plan, except those that exist already.

    Nothing is written before the plan is made, so that a request without rows leaves no files behind.
    """
    if not store.exists(REQUEST_NAME):
        _require_free(store)
    else:
        _require_same(store, _started_request(store), derivation.request)
        if store.exists(PLAN_NAME):
            return
    units = derivation.make_plan()
    if not units or not derivation.sources.rows:
        raise nothing_selected(store.url)
    if derivation.select is None:
        folders = range(len(derivation.sources.datasets))
        media = {name for source in folders for name in derivation.sources.folder(source, MEDIA_FOLDER)}
        require_room(units=len(units), media=len(media), where=store.url)
    tokenizer = derivation.sources.tokenizer()
    request = (derivation.request.model_dump_json(indent=2) + "\n").encode()
    if not store.create(REQUEST_NAME, request):
        _require_same(store, _started_request(store), derivation.request)
    _pinned_header(store, derivation.header)
    for name, data in tokenizer.items():
        store.put(name, data)
    store.create(PLAN_NAME, plan_to_bytes(units))


def _pinned_header(store: Store, header: DatasetHeader) -> DatasetHeader:
    """The header of the output, created if it is not there: an earlier release may have started it in another format.

    Raises `HeaderMismatch`.
    """
    if store.create(HEADER_NAME, header.to_bytes()):
        return header
    found = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
    header.require_equal(found, where=f"{store.url}/{HEADER_NAME}", fix="choose another output")
    return found


def _make_units(store: Store, derivation: Derivation, progress: bool) -> None:
    header = _pinned_header(store, derivation.header)
    units = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)
    done = committed_units(store)
    environment = {"derivation": derivation.request.model_dump(exclude={"sources"}), "pyarrow": pa.__version__}
    sources, media = derivation.sources, dict[str, FileRecord]()
    with tqdm(total=len(units), desc=derivation.request.command, unit=" shards", disable=not progress) as bar:
        for unit in units:
            if unit.index not in done:
                made = make_unit(sources, unit, header=header, select=derivation.select)
                whole = sources.shards[unit.start] if derivation.select is None else None
                media |= _put_media(store, sources, [one for one in sorted(made.media) if one[1] not in media])
                commit_files(
                    store,
                    unit.index,
                    shard=made.shard,
                    rejects=sources.rejects(whole) if whole else None,
                    faithfulness=sample_to_bytes(made.sample) if made.sample else None,
                    media=tuple(media[name] for name in sorted({name for _, name in made.media})),
                    rows=made.rows,
                    tokens=made.tokens,
                    targets=made.targets,
                    rejected=whole.record.rejected if whole else 0,
                    environment=environment,
                )
            bar.update(1)


def _put_media(store: Store, sources: Sources, files: Sequence[tuple[int, str]]) -> dict[str, FileRecord]:
    """Copy media files, given as (source, name). Returns their records by name. Raises `FileMissing`, `FileDamaged`."""

    def copy(one: tuple[int, str]) -> FileRecord:
        return put_media(store, {one[1]: sources.media_file(*one)})[0]

    with ThreadPoolExecutor(_COPIERS) as copiers:
        return {record.name: record for record in copiers.map(copy, files)}


def open_output(output: str | Path, sources: Sources) -> Store:
    """The store to write to. Raises `OutputNotApart`, `UnsupportedStore`, `StorageFailed`."""
    store = Store(output)
    for dataset in sources.datasets:
        if _overlap(store, dataset.store):
            raise OutputNotApart(
                store.url,
                found=f"a folder that contains the source {dataset.store.url}, or lies in it",
                wanted="a separate folder",
                fix="choose another output",
            )
    store.require_writable()
    return store


def _overlap(store: Store, other: Store) -> bool:
    if type(store.fs) is not type(other.fs):
        return False
    roots = [os.path.realpath(one.root) if one.is_local else one.root for one in (store, other)]
    mine, theirs = (PurePosixPath(Path(root).as_posix()) for root in roots)
    return mine.is_relative_to(theirs) or theirs.is_relative_to(mine)


def _require_free(store: Store) -> None:
    """Raise `OutputTaken` if the store holds files that sealing would list or remove."""
    folders = (SHARDS_FOLDER, COMMITS_FOLDER, REJECTS_FOLDER, FAITHFULNESS_FOLDER, MEDIA_FOLDER)
    found = [name for name in (HEADER_NAME, PLAN_NAME) if store.exists(name)]
    found += [f"{folder}/" for folder in folders if store.names(folder)]
    if found:
        raise OutputTaken(
            store.url,
            found=", ".join(found),
            wanted="no files of another dataset or capture",
            fix="choose another output",
        )


def _sealed_request(store: Store) -> Request | None:
    """The request of a sealed dataset; None if it was not derived, or copied here without its commit records."""
    manifest, _ = read_manifest(store)
    if not manifest.derived_from or not store.exists(commit_name(0)):
        return None
    try:
        fields = {"sources": manifest.derived_from, **read_commit(store, 0).environment["derivation"]}
        return Request.model_validate(fields)
    except (KeyError, TypeError, ValidationError):
        return None


def _started_request(store: Store) -> Request:
    """The request of an unfinished output. Raises `CommitDamaged`."""
    try:
        return parse_document(store.read(REQUEST_NAME), model=Request, where=REQUEST_NAME, error=CommitDamaged)
    except CommitDamaged as error:
        fix = f"delete {store.url}, which is unfinished, and re-run the command"
        raise CommitDamaged(f"{store.url}/{error.what}", found=error.found, wanted=error.wanted, fix=fix) from None


def _require_same(store: Store, found: Request | None, wanted: Request) -> None:
    """Raise `OutputTaken`, which names the first difference, unless the requests are equal."""
    if found == wanted:
        return
    what, theirs, mine = "", "a sealed dataset that was not made here by this command", wanted.command
    if found is not None:
        pairs: list[tuple[str, object, object]] = [
            ("command", found.command, wanted.command),
            ("sources", found.sources, wanted.sources),
        ]
        options = {**found.options, **wanted.options}
        pairs += [(name, found.options.get(name), wanted.options.get(name)) for name in options]
        what, theirs, mine = next((f": {name}", str(a), str(b)) for name, a, b in pairs if a != b)
    raise OutputTaken(
        f"{store.url}{what}",
        found=theirs[:300],
        wanted=mine[:300],
        fix="choose another output, or remove this one",
    )


def nothing_selected(where: str) -> NothingSelected:
    """The error for a dataset without rows."""
    return NothingSelected(
        where, found="0 rows", wanted="at least one row", fix="loosen the filters, or inspect the source"
    )
