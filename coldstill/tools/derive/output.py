"""The place of a new dataset: may it be made here, and is what lies here the same request's?"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from pydantic import JsonValue, ValidationError

from coldstill.common.models import FrozenModel, parse_document
from coldstill.storage_schema.commits import (
    COMMITS_FOLDER,
    FAITHFULNESS_FOLDER,
    REJECTS_FOLDER,
    commit_name,
    read_commit,
)
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import read_manifest
from coldstill.storage_schema.plan import PLAN_NAME
from coldstill.storage_schema.rows import MEDIA_FOLDER
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import SHARDS_FOLDER

from .errors import OutputNotApart, OutputTaken
from .sources import Sources

REQUEST_NAME = f"{RUN_FOLDER}/derivation.json"


class Request(FrozenModel):
    """What was asked for: the command, the ids of its sources in order, its options."""

    command: str
    sources: tuple[str, ...]
    options: dict[str, JsonValue]


def open_output(output: str | Path, sources: Sources) -> Store:
    """The store to write to. Raises `OutputNotApart`, `UnsupportedStore`, `StorageFailed`."""
    store = Store(output)
    for dataset in sources.datasets:
        if _overlap(store, dataset.store):
            raise OutputNotApart(
                store.url,
                found=f"a place in, or around, the source {dataset.store.url}",
                wanted="a folder of its own",
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


def require_free(store: Store) -> None:
    """Raise `OutputTaken` where something lies that sealing would list or remove."""
    folders = (SHARDS_FOLDER, COMMITS_FOLDER, REJECTS_FOLDER, FAITHFULNESS_FOLDER, MEDIA_FOLDER)
    found = [name for name in (HEADER_NAME, PLAN_NAME) if store.exists(name)]
    found += [f"{folder}/" for folder in folders if store.names(folder)]
    if found:
        raise OutputTaken(
            store.url,
            found=", ".join(found),
            wanted="nothing of another dataset or capture",
            fix="choose another output",
        )


def sealed_request(store: Store) -> Request | None:
    """The request that a sealed dataset was made for, if it was made for one and not copied to here."""
    manifest, _ = read_manifest(store)
    if not manifest.derived_from or not store.exists(commit_name(0)):
        return None
    try:
        fields = {"sources": manifest.derived_from, **read_commit(store, 0).environment["derivation"]}
        return Request.model_validate(fields)
    except (KeyError, TypeError, ValidationError):
        return None


def begun_request(store: Store) -> Request:
    """The request that an unsealed output was begun for. Raises `CommitDamaged`."""
    return parse_document(store.read(REQUEST_NAME), model=Request, where=REQUEST_NAME, error=CommitDamaged)


def require_same(store: Store, found: Request | None, wanted: Request) -> None:
    """Raise `OutputTaken` that names the first difference, unless the requests are equal."""
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
        fix="choose another output, or remove what is there",
    )
