"""Prepares a dataset directory: header, tokenizer files and plan, checked at every later start.

Runs on the driver and loads no weights. The header holds no time, host or path: equal captures have equal headers on
every machine.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from coldstill.common.hub_commit import hub_commit
from coldstill.common.processor import processor_settings, processor_sha256
from coldstill.common.progress import tqdm
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.header import HEADER_NAME, Codec, DatasetHeader
from coldstill.storage_schema.header_facts import (
    About,
    NamedIds,
    ProcessorFacts,
    TeacherFacts,
    hub_fingerprint,
    weights_fingerprint,
)
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.plan import PLAN_NAME, Plan, Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.repair import restore_header
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.store.retrying import RetryingStore
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER, TokenizerFacts, fingerprint_bytes

from .config import CaptureConfig, TeacherConfig
from .errors import DuplicateIds, TemplateDrops, all_rejected
from .reject_reasons import RejectReason
from .sources.files import SourceRow
from .sources.sequence_maker import SequenceMaker
from .sources.sequences import sample_id_of
from .sources.source import Source, open_source
from .sources.staging import remove_staging
from .teachers.adapter import adapter_of
from .teachers.checkpoint import (
    dtype_of,
    head_dtype_of,
    load_model_config,
    tokenizer_files,
    with_read_length,
)
from .teachers.engine_args import engine_args_that_change_values, quantization_of

_CHECKED_ROWS = 32
"""Number of rows that are tested before the slow steps: reading the whole source, and loading an engine."""
_MAX_LISTED = 3
"""Maximum number of duplicate ids in the error message."""
_SYSTEMATIC: dict[str, Any] = {"draw_method": "systematic", "draw_from": "tail", "draw_number": "by_tail_mass"}
"""What the header records of systematic draws."""
_LOSS_ON = {"generate": "last_turn", "pretrain": "all"}
"""Target tokens of the modes in which source.loss_on has no effect: the teacher's answer; every token."""


@dataclass(frozen=True)
class Prepared:
    """A dataset directory with header and plan, ready for commits."""

    store: Store
    header: DatasetHeader
    units: Plan
    layouts: tuple[str, ...] = ()
    """How the columns of the first rows were read, where their layout was recognized."""


def prepare(
    config: CaptureConfig,
    *,
    rank_ids: Callable[[DatasetHeader, Unit], Sequence[int]] | None = None,
    store: Store | None = None,
) -> Prepared:
    """Create the dataset directory, or check that `config` describes the one that exists.

    `rank_ids` makes the id rank table of a new dataset by a calibration pass; without it there is no table.
    `store`: the output, if it is open already.

    Raises `HeaderMismatch` for a changed configuration, and the errors of sources, templates and teachers.
    """
    config = with_read_length(config)
    store = store or RetryingStore(config.output, retry_for_s=config.cluster.store_retry_s, is_first=True)
    store.require_writable()
    restore_header(store)
    source, maker = open_checked(config, store)
    files, facts, model_config = read_teacher(config, maker)
    planned, was_surveyed = _stored_plan(store), source.is_surveyed
    if planned is None or not (was_surveyed or store.exists(MANIFEST_NAME)):
        units = source.plan(config.rows_per_unit)
    if planned is None and not store.exists(HEADER_NAME):
        require_unique_ids(config, source)
    if planned is not None:
        units = planned
    header = make_header(config, model_config=model_config, facts=facts, maker=maker, source_sha256=source.fingerprint)
    if not store.exists(HEADER_NAME):
        ranks = tuple(rank_ids(header, units[0])) if rank_ids and units else ()
        store.create(HEADER_NAME, header.model_copy(update={"id_ranks": ranks}).to_bytes())
    stored = _stored_header(store)
    if planned is not None and stored.source_sha256 != header.source_sha256 and not was_surveyed:
        remove_staging(store)  # it was made just now, from another source than the plan's
    resumed = header.model_copy(update={"id_ranks": stored.id_ranks, **_defaults_at_start(config.teacher, stored)})
    stored.require_equal(
        resumed,
        where="the configuration",
        fix=f"{store.url} was started with another value: {_restore(config.teacher, resumed, stored)}, or choose "
        "another output",
    )
    # With these files a reader of the dataset can decode its tokens without the teacher.
    for name, data in files.items():
        store.create(f"{TOKENIZER_FOLDER}/{name}", data)
    if planned is None and not store.create(PLAN_NAME, plan_to_bytes(units)):
        units = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)  # another driver created it first
    return Prepared(store, stored, units, maker.layouts)


def read_teacher(config: CaptureConfig, maker: SequenceMaker) -> tuple[dict[str, bytes], TokenizerFacts, Any]:
    """Tokenizer files, their facts and `config.json` of the teacher.

    Raises `TeacherUnusable` or `TokenizerMismatch` if the settings or the adapter do not fit them.
    """
    files = tokenizer_files(maker.tokenizer)
    if config.teacher.adapter:
        adapter_of(config.teacher).check_tokenizer(files, has_own_template=config.source.chat_template is not None)
    facts = fingerprint_bytes(files[TOKENIZER_FILE], where=f"{config.teacher.model}: {TOKENIZER_FILE}")
    return files, facts, load_model_config(config.teacher, facts)


def _stored_plan(store: Store) -> Plan | None:
    """The plan of an earlier start. One that is damaged is deleted: source and `rows_per_unit` give the same again."""
    try:
        return plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)
    except FileNotFoundError:
        return None
    except CommitDamaged:
        store.delete(PLAN_NAME)
        return None


def _defaults_at_start(teacher: TeacherConfig, stored: DatasetHeader) -> dict[str, Any]:
    """What the capture was started with, where `draw_method` or `kept_draws` is not set: earlier releases had other
    defaults. Another `top_k` must be set, because engines take it from the configuration."""
    unset = {} if "draw_method" in teacher.model_fields_set or teacher.is_own_class else _SYSTEMATIC
    names = [*unset, *({"kept_draws"} - teacher.model_fields_set)]
    return {name: getattr(stored, name) for name in names} if teacher.draws == stored.draws else {}


def _restore(teacher: TeacherConfig, found: DatasetHeader, stored: DatasetHeader) -> str:
    """How to get the stored values back. The defaults of some keys have changed between releases."""
    names = [name for name in type(teacher).model_fields if getattr(found, name, None) != getattr(stored, name, None)]
    if stored.kept_ids != found.kept_ids:
        column = stored.about.score_ids.column if stored.about.score_ids else "null"
        return f"set source.score_ids: {column}"
    if (named := stored.about.score_ids) and found.about.score_ids != named:
        return f"set source.score_ids: {named.column}, source.max_score_ids: {named.most}, teacher.top_k: {named.top_k}"
    if "draws" in names:  # the header's `kept_draws` is at most `draws`, and once that is restored, defaults follow it
        followers = {"draw_method"} - (teacher.model_fields_set if stored.draws else set()) | {"kept_draws"}
        names = [name for name in names if name not in followers]
    if not names and found.source_sha256 != stored.source_sha256:
        return "put the files of the source back as they were then"
    keys = ", ".join(f"teacher.{name}: {getattr(stored, name)}" for name in names)
    return f"set {keys}" if keys else "restore it"


def open_checked(config: CaptureConfig, store: Store | None = None) -> tuple[Source, SequenceMaker]:
    """The source and its sequence maker, after a test on the first rows.

    Raises the errors of sources, templates and tokenizers.
    """
    source = open_source(config.source, store)
    is_started = store is not None and store.exists(HEADER_NAME)
    header = _stored_header(store) if store is not None and is_started else None
    maker = SequenceMaker.of(config, today=date.today(), header=header)
    rows = source.head(_CHECKED_ROWS)
    if is_started:
        maker.check(rows)  # if no row is usable now, then a setting has changed, which the header shows
    else:
        _require_usable(config, maker, rows)
    return source, maker


def _require_usable(config: CaptureConfig, maker: SequenceMaker, rows: Sequence[SourceRow]) -> None:
    """Raise an error if no row is usable, which names the parts that the chat template drops from all of them."""
    problems = [problem for problem in maker.check(rows) if problem]
    if len(problems) < len(rows) or all(problem.reason == RejectReason.ADAPTER_DROPPED for problem in problems):
        return  # the user's function may well drop the first rows
    lost = frozenset.intersection(*(problem.lost for problem in problems))
    if not lost:
        raise all_rejected(
            Counter(problem.reason.value for problem in problems),
            what=f"{config.source.path or config.source.dataset or config.source.rows_of}: the first {len(rows)} rows",
            example=f"row {rows[0].number}: {problems[0].detail}",
            columns=next((row.columns for row in rows if row.columns), None),
        )
    fix = "set source.chat_template to a template that renders it"
    if lost.isdisjoint({"text", "images"}):
        accepted = sorted(lost | set(config.source.may_drop))
        fix += f", or accept the loss: source.may_drop: [{', '.join(accepted)}]"
    raise TemplateDrops(
        maker.template.name,
        found=f"each of the first {len(rows)} rows loses {', '.join(sorted(lost))}, such as {problems[0].detail}",
        wanted="all parts of a chat in its rendered text",
        fix=fix,
    )


def require_unique_ids(config: CaptureConfig, source: Source) -> None:
    """Read the ids of all rows once, if the first rows have any. Raises `DuplicateIds`.

    A row takes 8 bytes of memory: a hash of its id. Ids whose hashes are equal are then compared.
    """
    settings = config.source
    has_ids = any((row.columns or {}).get(settings.id) for row in source.head(_CHECKED_ROWS))
    if settings.duplicate_ids != "refuse" or settings.adapter is not None or settings.rows_of or not has_ids:
        return  # the user's function runs on the workers, not on all rows here; a dataset's ids stay what they are

    def ids() -> Iterator[str]:
        for row in source.rows(only=settings.id):
            if row.columns is not None and not row.is_dropped:
                yield sample_id_of(row.number, row.columns, settings)

    hashes = array("Q", map(_hash_of, tqdm(ids(), desc="checking ids", unit=" rows", delay=3)))
    ordered = np.frombuffer(hashes, np.uint64)
    ordered.sort()
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    counts = Counter(name for name in ids() if _hash_of(name) in repeated)
    found = [(name, count) for name, count in counts.most_common() if count > 1]
    if found:
        listed = ", ".join(f"{name!r} {count} times" for name, count in found[:_MAX_LISTED])
        raise DuplicateIds(
            f"{source.name}: column {settings.id}",
            found=f"{len(found):,} ids that several rows have, such as {listed}",
            wanted="another id for each row",
            fix="set source.duplicate_ids to number, which adds the row number to each id, or correct source.id",
        )


def _hash_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _stored_header(store: Store) -> DatasetHeader:
    return DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)


def make_header(
    config: CaptureConfig, *, model_config: Any, facts: TokenizerFacts, maker: SequenceMaker, source_sha256: str
) -> DatasetHeader:
    """The header of a capture, without an id rank table."""
    teacher, width = config.teacher, config.kept_width(token_count=facts.token_count)
    header = DatasetHeader(
        teacher=_teacher_facts(teacher, model_config),
        tokenizer_fingerprint=facts.fingerprint,
        chat_template_sha256=maker.template_sha256,
        vocab_size=model_config.get_text_config().vocab_size,
        token_count=facts.token_count,
        top_k=width,
        kept_ids="top_k_and_named" if config.source.score_ids else "top_k",
        min_prob=teacher.min_prob,
        draws=teacher.draws,
        **_SYSTEMATIC if teacher.draws and teacher.draw_method == "systematic" else {},
        kept_draws=min(teacher.draws, teacher.kept_draws),
        draw_logprobs=teacher.draw_logprobs,
        draw_seed=teacher.draw_seed,
        codec=Codec.preset(config.fidelity, top_k=width),
        tail="exact" if teacher.can_draw else "derived",
        mode=config.mode,
        documents=config.documents if config.mode == "pretrain" else None,
        sampling=config.sampling.model_dump(mode="json") if config.mode == "generate" else None,
        loss_on=_LOSS_ON.get(config.mode, config.source.loss_on),
        order=config.order,
        max_length=teacher.max_length,
        over_long=maker.over_long,
        rows_per_unit=config.rows_per_unit,
        source_sha256=source_sha256,
        teacher_prompt=maker.teacher_prompt,
        about=_about(config, maker, facts),
    )
    return maker.stored.header(header) if maker.stored else header


def _about(config: CaptureConfig, maker: SequenceMaker, facts: TokenizerFacts) -> About:
    source = config.source.model_dump(mode="json")
    return About(
        license=config.license,
        template_arguments=(source["template_arguments"] or None) if maker.template_sha256 else None,
        template_date=str(maker.template_date) if maker.template_date else None,
        source_adapter=source["adapter"],
        end_token_ids=maker.end_token_ids,
        tokenizer_pipeline_sha256=facts.pipeline_sha256,
        media_in_row_bytes=config.source.images_in_row_bytes if maker.processor else None,
        max_images=config.teacher.max_images if maker.processor else None,
        max_read_length=config.teacher.max_read_length,
        processor=_processor_facts(maker.processor) if maker.processor else None,
        score_ids=NamedIds(column=config.source.score_ids, top_k=config.teacher.top_k, most=config.source.max_score_ids)
        if config.source.score_ids
        else None,
    )


def _processor_facts(processor: Any) -> ProcessorFacts:
    return ProcessorFacts(
        name=type(processor).__name__,
        settings_sha256=processor_sha256(processor),
        settings=processor_settings(processor),
    )


def _teacher_facts(teacher: TeacherConfig, model_config: Any) -> TeacherFacts:
    folder = Path(teacher.model)
    commit = None if folder.is_dir() else hub_commit(teacher.model, teacher.revision, config=model_config)
    return TeacherFacts(
        name=folder.name if folder.is_dir() else teacher.model,
        revision=None if folder.is_dir() else commit or teacher.revision,
        weights_fingerprint=weights_fingerprint(folder) if folder.is_dir() else hub_fingerprint(commit),
        dtype=dtype_of(teacher, model_config),
        head_dtype=head_dtype_of(teacher, model_config),
        quantization=quantization_of(teacher, model_config),
        adapter=adapter_of(teacher).facts if teacher.adapter else None,
        engine_args=engine_args_that_change_values(teacher.engine, teacher.engine_args),
    )
