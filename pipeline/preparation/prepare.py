"""Before any unit is given out: header, tokenizer files and plan, made once and then held against every later start.

Settings in, `Prepared` out. Runs on the driver and loads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.sources.chat import SequenceMaker
from coldstill.pipeline.sources.readers import open_source
from coldstill.pipeline.sources.staging import remove_staging
from coldstill.pipeline.tokenizer import files_of
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.plan import PLAN_NAME, Plan, Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER, fingerprint_bytes

from .header import load_model_config, make_header

_CHECKED_ROWS = 32
"""So many of the source's first rows are tried before a pass over the source, or an engine, costs time."""


@dataclass(frozen=True)
class Prepared:
    """A dataset directory that units can be committed to."""

    store: Store
    header: DatasetHeader
    units: Plan


def prepare(
    config: CaptureConfig, *, rank_ids: Callable[[DatasetHeader, Unit], Sequence[int]] | None = None
) -> Prepared:
    """Create the dataset directory, or check that it is the one that `config` describes.

    `rank_ids`: the pilot that gives a new dataset's id rank table; none, no table.
    Raises `HeaderMismatch` for a changed configuration, and the errors of sources, templates and teachers.
    """
    store = Store(config.output)
    store.require_writable()
    source = open_source(config.source, store)
    maker = SequenceMaker.of(config)
    maker.check(source.head(_CHECKED_ROWS))
    tokenizer_files = files_of(maker.tokenizer)
    facts = fingerprint_bytes(tokenizer_files[TOKENIZER_FILE], where=f"{config.teacher.model}: {TOKENIZER_FILE}")
    model_config = load_model_config(config.teacher, facts)
    is_planned, was_surveyed = store.exists(PLAN_NAME), source.is_surveyed
    if not is_planned or not (was_surveyed or store.exists(MANIFEST_NAME)):
        units = source.plan(config.rows_per_unit)
    if is_planned:
        units = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)
    header = make_header(config, model_config=model_config, facts=facts, maker=maker, source_sha256=source.fingerprint)
    if not store.exists(HEADER_NAME):
        ranks = tuple(rank_ids(header, units[0])) if rank_ids and units else ()
        store.create(HEADER_NAME, header.model_copy(update={"id_ranks": ranks}).to_bytes())
    stored = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
    if is_planned and stored.source_sha256 != header.source_sha256 and not was_surveyed:
        remove_staging(store)  # it is of another source than the plan
    stored.require_equal(
        header.model_copy(update={"id_ranks": stored.id_ranks}),
        where="the configuration",
        fix=f"{store.url} was begun with another value: put it back, or choose another output",
    )
    # Who receives the dataset can read its tokens without the teacher.
    for name, data in tokenizer_files.items():
        store.create(f"{TOKENIZER_FOLDER}/{name}", data)
    if not is_planned and not store.create(PLAN_NAME, plan_to_bytes(units)):
        units = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)  # another driver was first
    return Prepared(store, stored, units)
