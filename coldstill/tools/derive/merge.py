"""`coldstill merge`: one dataset with all rows, rejects and media of several, shard by shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.header import HEADER_NAME, DatasetHeader
from coldstill.storage_schema.header_facts import About, ProcessorFacts, RowWriter, TeacherPrompt
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.rows import MEDIA_FOLDER
from coldstill.tools.errors import InvalidRequest, MediaClash

from .deriving import Derivation, Request, derive
from .sources import Sources

_OF_WRITER = ("writer", "writer_prompt")
"""Facts in `about` of which a merged header could state neither value."""
_LEAVE_APART = "leave the datasets apart, and train on a list of them: dataset: [A, B]"


def merge(roots: Sequence[str | Path], output: str | Path, *, progress: bool = True) -> Dataset:
    """One dataset at `output` with the rows of the datasets at `roots`, in that order; a shard stays a shard.

    Headers may differ only in `source_sha256` and `rows_per_unit`: see `merged_header`. The faithfulness samples,
    the rejects and the media of all rows are copied; the tokenizer files are those of the first. Re-run an interrupted
    merge to resume.

    Raises `InvalidRequest`, `HeaderMismatch`, `TokenizerMismatch`, `MediaClash`, and what `open_dataset` and `derive`
    raise.
    """
    if not roots:
        raise InvalidRequest("merge", found="no dataset", wanted="at least one", fix="name the datasets to merge")
    sources = Sources([open_dataset(root) for root in roots])
    if len(set(sources.ids)) < len(sources.ids):
        raise InvalidRequest(
            "merge", found="a dataset twice", wanted="different datasets", fix="name each dataset once"
        )
    _check_media(sources)
    derivation = Derivation(
        request=Request(command="merge", sources=sources.ids, options={}),
        sources=sources,
        header=merged_header(sources.datasets),
        select=None,
        make_plan=lambda: [
            Unit(number, number, shard.first_row, shard.record.rows + shard.record.rejected)
            for number, shard in enumerate(sources.shards)
        ],
    )
    return derive(output, derivation, progress=progress)


def merged_header(datasets: Sequence[Dataset]) -> DatasetHeader:
    """The header of the first dataset, with the largest `rows_per_unit` and what all say in `about`.

    A dataset that has no processor may be one of text; those that have one must agree, and it is that of all rows. If
    the `source_sha256` differ, the new one is the sha256 of all of them in order, in hex, each with a line feed.

    Raises `HeaderMismatch`, which names the field, if two headers differ in any other field, or in the writer of the
    rows: a loss on the student's own rows goes by it.
    """
    # What format 1 does not state is unknown of the merged rows, so a header that states less comes first.
    first = min((dataset.header for dataset in datasets), key=lambda header: header.format_version)
    processor = _processor_of(datasets)
    about, wanted = first.about, first.model_copy(update={"about": _with_processor(first.about, processor)})
    _require_one_writer(datasets)
    for dataset in datasets:
        about = about.shared(dataset.header.about)
        own = {name: getattr(first, name) for name in ("source_sha256", "rows_per_unit", "id_ranks")}
        facts = {name: getattr(dataset.header.about, name) for name in ("license", "normalized_over")}
        facts["processor"] = dataset.header.about.processor or processor
        own["about"] = first.about.model_copy(update=facts)
        wanted.require_equal(
            dataset.header.model_copy(update=own),
            where=f"{dataset.store.url}/{HEADER_NAME}",
            fix=f"merge only captures of the same teacher with the same configuration; or {_LEAVE_APART}",
        )
    _require_one_rank_table(datasets)
    digests = [dataset.header.source_sha256 for dataset in datasets]
    together = hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
    return first.newest().model_copy(
        update={
            "source_sha256": digests[0] if len(set(digests)) == 1 else together,
            "about": _with_processor(about, processor),
            "rows_per_unit": max(dataset.header.rows_per_unit for dataset in datasets),
        }
    )


def _require_one_writer(datasets: Sequence[Dataset]) -> None:
    """Raise `HeaderMismatch` if the headers differ in a fact of `_OF_WRITER`, also where one does not state it."""
    first = datasets[0].header.about
    for dataset in datasets:
        for name in _OF_WRITER:
            found, wanted = getattr(dataset.header.about, name), getattr(first, name)
            if found != wanted:
                raise HeaderMismatch(
                    f"{dataset.store.url}/{HEADER_NAME}: about.{name}",
                    found=_in_words(found),
                    wanted=f"{_in_words(wanted)}, as in {datasets[0].store.url}",
                    fix=_LEAVE_APART,
                )


def _require_one_rank_table(datasets: Sequence[Dataset]) -> None:
    """Raise `HeaderMismatch` if the `id_ranks` differ: a merge copies shards, whose ids are ranks in that table.

    It is compared last, and not printed: each capture makes its own table, of thousands of ids.
    """
    first = datasets[0]
    for dataset in datasets:
        if dataset.header.id_ranks != first.header.id_ranks:
            raise HeaderMismatch(
                f"{dataset.store.url}/{HEADER_NAME}: id_ranks",
                found="another table of frequent token ids, which each capture makes from its own first rows",
                wanted=f"the table of {first.store.url}",
                fix=f"{_LEAVE_APART}. Captures with calibration_targets: 0 have no table and can be merged",
            )


def _in_words(fact: RowWriter | TeacherPrompt | None) -> str:
    return "none" if fact is None else json.dumps(fact.model_dump(mode="json", exclude_none=True), ensure_ascii=False)


def _processor_of(datasets: Sequence[Dataset]) -> ProcessorFacts | None:
    """The first processor that a header states; None if rows of a dataset without one have media files."""
    for dataset in datasets:
        has_media = any(file.name.startswith(f"{MEDIA_FOLDER}/") for file in dataset.manifest.files)
        if dataset.header.about.processor is None and has_media:
            return None
    stated = (dataset.header.about.processor for dataset in datasets)
    return next((processor for processor in stated if processor is not None), None)


def _with_processor(about: About, processor: ProcessorFacts | None) -> About:
    return about.model_copy(update={"processor": processor})


def _check_media(sources: Sources) -> None:
    digests: dict[str, str] = {}
    for source, dataset in enumerate(sources.datasets):
        for name, file in sources.folder(source, MEDIA_FOLDER).items():
            if digests.setdefault(name, file.sha256) != file.sha256:
                raise MediaClash(
                    f"{dataset.store.url}/{name[:200]}",
                    found=f"sha256 {file.sha256}",
                    wanted=f"sha256 {digests[name]}, as in an earlier source",
                    fix="before a capture, name media files by their content",
                )
