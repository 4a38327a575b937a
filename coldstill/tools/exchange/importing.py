"""What every import shares: the header, the plausibility checks, and committing rows as a new sealed dataset.

Re-run an interrupted import to resume: committed units are not made again. A changed setting on an existing output is
a `HeaderMismatch` that names the field. `source_sha256` covers the source's content and the settings that decide what
its bytes mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from pydantic import ValidationError

from coldstill.common.errors import ColdstillError
from coldstill.common.progress import tqdm
from coldstill.storage_schema.commits import Reject, commit_unit, committed_units
from coldstill.storage_schema.errors import InvalidHeader
from coldstill.storage_schema.header import HEADER_NAME, Codec, DatasetHeader
from coldstill.storage_schema.header_facts import ImportFacts, TeacherFacts
from coldstill.storage_schema.manifest import MANIFEST_NAME, MAX_SEALED_UNITS, Manifest, read_manifest, seal
from coldstill.storage_schema.plan import PLAN_NAME, Plan, Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.shard import metadata_json
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER, fingerprint
from coldstill.tools.errors import SourceUnreadable, UnusableRow, invalid_field
from coldstill.tools.reject_reasons import IMPORT_REASONS

from .plausibility import MassSample, Plausibility, require_aligned, require_full_softmax, votes_of_all
from .settings import ImportSettings

UNKNOWN = "unknown"
"""The teacher's weights fingerprint and data types in the header: no other tool stores them."""

SAMPLE_ROWS = 32
SAMPLE_POSITIONS = 2048
MAX_SAMPLE_ROWS = 1024
"""Rows that are checked before anything is written: more than `SAMPLE_ROWS` where the rows have few targets."""


class ImportedRow(NamedTuple):
    """One sequence of a source: its row, or the error that rejects it.

    `values float64 [N, W]`: the log-probs of its targets before any was dropped or scaled, -inf where absent; `errors`:
    bounds of their errors, where the layout states them.
    """

    sample_id: str
    row: CachedRow | ColdstillError
    values: np.ndarray | None = None
    errors: np.ndarray | None = None


class RowSource(Protocol):
    """The sequences of a source by number, so that an import can resume at any unit."""

    def __len__(self) -> int:
        """The number of sequences, counted without decoding any."""

    def items(self, start: int) -> Iterator[ImportedRow]:
        """Sequences from number `start` on."""


def imported_header(
    settings: ImportSettings,
    *,
    columns: int = 0,
    top_k: int,
    source_sha256: str,
    imported: ImportFacts | None = None,
) -> DatasetHeader:
    """The header of an import with the `tokenizer.json` in `settings.tokenizer`; `imported`: what is read.

    `columns`: logit columns of the teacher, as far as the files name them; the header has the largest of these, of
    `settings.vocab_size` and of the number of the tokenizer's ids. `top_k` is at most that last number.

    Raises `TokenizerNotFound`, `InvalidHeader`.
    """
    facts = fingerprint(settings.tokenizer)
    top_k = min(top_k, facts.token_count)
    fields = {
        "codec": Codec.preset(settings.fidelity, top_k=top_k),
        "teacher": TeacherFacts(
            name=settings.teacher,
            revision=settings.revision,
            weights_fingerprint=UNKNOWN,
            dtype=UNKNOWN,
            head_dtype=UNKNOWN,
        ),
        "tokenizer_fingerprint": facts.fingerprint,
        "vocab_size": max(settings.vocab_size or 0, columns, facts.token_count),
        "token_count": facts.token_count,
        "top_k": top_k,
        "min_prob": 0.0,
        "draws": 0,
        "kept_draws": 0,
        "draw_seed": 0,
        "tail": "derived",
        "mode": "imported",
        "loss_on": "given",
        "max_length": settings.max_length,
        "over_long": "reject",
        "rows_per_unit": settings.rows_per_unit,
        "source_sha256": source_sha256,
        "about": {
            "license": settings.license,
            "normalized_over": settings.normalized_over,
            "imported": imported,
        },
    }
    try:
        return DatasetHeader.model_validate(fields)
    except ValidationError as failure:
        raise invalid_field(failure, where="import", error=InvalidHeader) from None


def import_with(
    settings: ImportSettings,
    rows: RowSource,
    output: str | Path,
    *,
    columns: int = 0,
    top_k: int,
    source_sha256: str,
    imported: ImportFacts,
    plausibility: Plausibility,
    progress: bool,
) -> Manifest:
    """`import_rows` with the header, tokenizer and treatment of bad rows that `settings` give.

    `imported_header` explains `columns`, `top_k` and `imported`. Raises what it and `import_rows` raise.
    """
    return import_rows(
        rows,
        output,
        header=imported_header(settings, columns=columns, top_k=top_k, source_sha256=source_sha256, imported=imported),
        tokenizer=settings.tokenizer,
        bad_rows=settings.bad_rows,
        plausibility=plausibility,
        progress=progress,
    )


def import_rows(
    rows: RowSource,
    output: str | Path,
    *,
    header: DatasetHeader,
    tokenizer: str | Path,
    bad_rows: Literal["fail", "reject"] = "fail",
    plausibility: Plausibility | None = None,
    progress: bool = True,
) -> Manifest:
    """Write `rows` as a sealed dataset to `output`, `header.rows_per_unit` sequences per shard; its manifest.

    One unit is in memory at a time: `rows_per_unit * targets of a row * top_k * 8` bytes. `bad_rows`: a sequence that
    cannot become a row ends the import (`fail`; committed units are kept), or is written to the rejects with one of
    `IMPORT_REASONS` (`reject`). `plausibility` checks each row and each unit before it is written.

    Raises `HeaderMismatch`, `SourceUnreadable`, `StorageFailed`, the error of a bad row, and those of `plausibility`.
    """
    if len(rows) == 0:
        raise SourceUnreadable("source", found="no row", wanted="at least one")
    store, most = Store(output), MAX_SEALED_UNITS * header.rows_per_unit
    if len(rows) > most and not store.exists(PLAN_NAME):  # before a list of the units takes memory
        raise SourceUnreadable(
            "source",
            found=f"{len(rows):,} rows",
            wanted=f"at most {most:,}: {MAX_SEALED_UNITS:,} shards of {header.rows_per_unit}",
            fix="raise --rows-per-unit",
        )
    header, units = _begin(store, rows, header, Path(tokenizer))
    if store.exists(MANIFEST_NAME):
        return read_manifest(store)[0]
    done = committed_units(store)
    items: Iterator[ImportedRow] = iter(())
    next_row = -1
    with tqdm(total=len(rows), desc="import", unit=" rows", disable=not progress) as bar:
        for unit in units:
            if unit.index not in done:
                if next_row != unit.first_row:
                    items = rows.items(unit.first_row)
                good, rejects = _split_bad_rows(items, unit, header, bad_rows, plausibility)
                commit_unit(store, unit.index, rows=good, rejects=rejects, header=header, environment={})
                next_row = unit.first_row + unit.rows
            bar.update(unit.rows)
    return seal(store)


def first_rows(rows: RowSource) -> list[ImportedRow]:
    """Rows to check before anything is written, without those that are rejected."""
    found: list[ImportedRow] = []
    positions = 0
    for item in itertools.islice(rows.items(0), MAX_SAMPLE_ROWS):
        if isinstance(item.row, CachedRow):
            found.append(item)
            positions += item.row.positions.size
        if len(found) >= SAMPLE_ROWS and positions >= SAMPLE_POSITIONS:
            break
    return found


def require_plausible(
    rows: RowSource,
    settings: ImportSettings,
    *,
    token_count: int,
    mass_fix: str,
    alternatives: Mapping[str, Callable[[], RowSource]] | None = None,
) -> Plausibility:
    """Check the first rows, and return the checks of all others.

    `alternatives`: other settings in words, with the rows that they give. One is advised only if it passes here.

    Raises `AlignmentDoubtful`, `NotFullSoftmax`.
    """
    items = first_rows(rows)
    sample = MassSample(token_count)
    for item in items:
        if item.values is not None and isinstance(item.row, CachedRow):
            sample.add(item.values, item.errors, item.row)
    taken = _cached(items)
    if taken and not votes_of_all(taken).is_clear:
        advice = next(
            (words for words, other in (alternatives or {}).items() if votes_of_all(_cached(_try(other))).is_clear), ""
        )
        require_aligned(taken, assume=settings.assume_aligned, advice=advice)
    require_full_softmax(sample, settings.normalized_over, fix=mass_fix)
    return Plausibility(token_count=token_count, normalized_over=settings.normalized_over, mass_fix=mass_fix)


def _try(make: Callable[[], RowSource]) -> list[ImportedRow]:
    try:
        return first_rows(make())
    except ColdstillError:
        return []


def _cached(items: Iterable[ImportedRow]) -> list[CachedRow]:
    return [item.row for item in items if isinstance(item.row, CachedRow)]


def _begin(store: Store, rows: RowSource, header: DatasetHeader, tokenizer: Path) -> tuple[DatasetHeader, Plan]:
    """Write header, tokenizer files and plan, or check that those of an earlier start are the same; header and plan."""
    store.require_writable()
    if not store.create(HEADER_NAME, header.to_bytes()):
        stored = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
        stored.require_equal(
            header,
            where="the import",
            fix=f"{store.url} was started with another value: use that value, or choose another output",
        )
        header = stored  # an earlier release may have started it in another format
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            store.create(f"{TOKENIZER_FOLDER}/{name}", (tokenizer / name).read_bytes())
    if not store.exists(PLAN_NAME):
        size = header.rows_per_unit
        starts = range(0, len(rows), size)
        plan = [Unit(i, start, start, min(size, len(rows) - start)) for i, start in enumerate(starts)]
        store.create(PLAN_NAME, plan_to_bytes(plan))
    return header, plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)


def _split_bad_rows(
    items: Iterator[ImportedRow],
    unit: Unit,
    header: DatasetHeader,
    bad_rows: str,
    plausibility: Plausibility | None,
) -> tuple[list[CachedRow], list[Reject]]:
    good: list[CachedRow] = []
    rejects: list[Reject] = []
    sample = plausibility.new_sample() if plausibility else None
    for number in range(unit.first_row, unit.first_row + unit.rows):
        item = next(items, None)
        if item is None:
            raise SourceUnreadable(
                "source", found=f"its end at row {number}", wanted="as many rows as its files declare"
            )
        try:
            row = _checked(item, header)
            if plausibility:
                plausibility.check_row(row)
            if sample and item.values is not None:
                sample.add(item.values, item.errors, row)
            good.append(row)
        except tuple(IMPORT_REASONS) as error:
            if bad_rows == "fail":
                raise
            rejects.append(Reject(number, item.sample_id, IMPORT_REASONS[type(error)], str(error)))
    if plausibility and sample:
        plausibility.check_rows(sample)
    return good, rejects


def _checked(item: ImportedRow, header: DatasetHeader) -> CachedRow:
    if isinstance(item.row, ColdstillError):
        raise item.row
    if item.row.token_ids.size > header.max_length:
        raise UnusableRow(
            item.sample_id,
            found=f"{item.row.token_ids.size} tokens",
            wanted=f"at most {header.max_length}",
            fix="reject such rows with --bad-rows reject; in Python, max_length can be raised too",
        )
    item.row.check(token_count=header.token_count)
    metadata_json(item.row)
    return item.row
