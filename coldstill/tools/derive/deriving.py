"""What merge, split and subset share: a plan of units in, a sealed dataset out, through the real commit protocol.

What was asked for is pinned before the first unit and stands in each commit record, so that the same command goes on
after a kill, and another one is refused. Units that have a commit record are not made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from coldstill.storage_schema.commits import commit_files, committed_units
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.faithfulness import sample_to_bytes
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.rows import MEDIA_FOLDER
from coldstill.storage_schema.store import Store

from .errors import NothingSelected
from .output import REQUEST_NAME, Request, begun_request, open_output, require_free, require_same, sealed_request
from .selecting import Select
from .sources import Sources
from .units import make_unit


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A new dataset to be: with `select` the rows that it takes, without all rows and rejects, shard by shard."""

    request: Request
    sources: Sources
    header: DatasetHeader
    select: Select | None
    make_plan: Callable[[], list[Unit]]


def derive(output: str | Path, derivation: Derivation, *, progress: bool) -> Dataset:
    """The sealed dataset at `output`, begun, gone on with, or there already.

    Raises `OutputTaken`, `OutputNotApart`, `HeaderMismatch` for another header begun there, `NothingSelected`,
    `UnsupportedStore`, `StorageFailed`, `TokenizerMismatch`, and what reading a damaged source raises.
    """
    store = open_output(output, derivation.sources)
    if store.exists(MANIFEST_NAME):
        require_same(store, sealed_request(store), derivation.request)
    else:
        _begin(store, derivation, progress)
        _make_units(store, derivation, progress)
    seal(store, derived_from=derivation.sources.ids)
    return open_dataset(store.url)


def _begin(store: Store, derivation: Derivation, progress: bool) -> None:
    """Write what stands before the first unit, whatever of it is there already. Nothing is written before the plan is
    known: a request that selects nothing leaves nothing."""
    if not store.exists(REQUEST_NAME):
        require_free(store)
    else:
        require_same(store, begun_request(store), derivation.request)
        if store.exists(PLAN_NAME):
            _pin_header(store, derivation.header)
            return
    units = derivation.make_plan()
    if not units or not derivation.sources.rows:
        raise nothing_selected(store.url)
    tokenizer = derivation.sources.tokenizer()
    request = (derivation.request.model_dump_json(indent=2) + "\n").encode()
    if not store.create(REQUEST_NAME, request):
        require_same(store, begun_request(store), derivation.request)
    _pin_header(store, derivation.header)
    for name, data in tokenizer.items():
        store.put(name, data)
    if derivation.select is None:
        _put_media(store, derivation.sources, progress)
    store.create(PLAN_NAME, plan_to_bytes(units))


def _pin_header(store: Store, header: DatasetHeader) -> None:
    if not store.create(HEADER_NAME, header.to_bytes()):
        found = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
        header.require_equal(found, where=f"{store.url}/{HEADER_NAME}", fix="choose another output")


def _put_media(store: Store, sources: Sources, progress: bool) -> None:
    places = {name: source for source in range(len(sources.datasets)) for name in sources.folder(source, MEDIA_FOLDER)}
    for name, source in tqdm(places.items(), desc="media", unit=" files", disable=not (progress and places)):
        store.put(name, sources.medium(source, name))


def _make_units(store: Store, derivation: Derivation, progress: bool) -> None:
    units = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)
    done = committed_units(store)
    environment = {"derivation": derivation.request.model_dump(exclude={"sources"}), "pyarrow": pa.__version__}
    sources, media = derivation.sources, set[str]()
    with tqdm(total=len(units), desc=derivation.request.command, unit=" shards", disable=not progress) as bar:
        for unit in units:
            if unit.index not in done:
                made = make_unit(sources, unit, header=derivation.header, select=derivation.select)
                whole = sources.shards[unit.start] if derivation.select is None else None
                for source, name in sorted(made.media):
                    if derivation.select is not None and name not in media:
                        store.put(name, sources.medium(source, name))
                        media.add(name)
                commit_files(
                    store,
                    unit.index,
                    shard=made.shard,
                    rejects=sources.rejects(whole) if whole else None,
                    faithfulness=sample_to_bytes(made.sample) if made.sample else None,
                    rows=made.rows,
                    tokens=made.tokens,
                    targets=made.targets,
                    rejected=whole.record.rejected if whole else 0,
                    environment=environment,
                )
            bar.update(1)


def nothing_selected(where: str) -> NothingSelected:
    """The error of a dataset without rows."""
    return NothingSelected(
        where, found="0 rows", wanted="at least one row", fix="loosen the filters, or look at the source"
    )
