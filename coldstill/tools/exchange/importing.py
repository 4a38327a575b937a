"""What every import shares: the header, the plausibility checks, and committing rows as a new sealed dataset.

Re-run an interrupted import to resume: committed units are not made again. A changed setting on an existing output is
a `HeaderMismatch` that names the field. `source_sha256` covers the source's content and the settings that decide what
its bytes mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.commits import Reject, commit_unit, committed_units
from coldstill.storage_schema.errors import InvalidHeader
from coldstill.storage_schema.header import HEADER_NAME, Codec, DatasetHeader, TeacherFacts
from coldstill.storage_schema.manifest import MANIFEST_NAME, Manifest, read_manifest, seal
from coldstill.storage_schema.plan import PLAN_NAME, Plan, Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER, fingerprint
from coldstill.tools.errors import (
    AlignmentDoubtful,
    NotFullSoftmax,
    SourceUnreadable,
    UnusableRow,
    invalid_field,
)
from coldstill.tools.reject_reasons import IMPORT_REASONS

from .derived_targets import MIN_TAIL
from .settings import ImportSettings

UNKNOWN = "unknown"
"""The teacher's weights fingerprint and data types in the header: no other tool stores them."""

SAMPLE_ROWS = 32
MIN_POSITIONS = 256
"""Below this many positions, a wrong alignment cannot be told from chance."""

OPEN_PROBABILITY = 1e-5
"""In a full softmax, a position whose LEAST kept id has more than this has a tail well above `MIN_TAIL`."""


class ImportedRow(NamedTuple):
    """One sequence of a source: its row, or the error that rejects it."""

    sample_id: str
    row: CachedRow | ColdstillError


class RowSource(Protocol):
    """The sequences of a source by number, so that an import can resume at any unit."""

    def __len__(self) -> int:
        """The number of sequences, counted without decoding any."""

    def items(self, start: int) -> Iterator[ImportedRow]:
        """Sequences from number `start` on."""


def imported_header(settings: ImportSettings, *, columns: int = 0, top_k: int, source_sha256: str) -> DatasetHeader:
    """The header of an import with the `tokenizer.json` in `settings.tokenizer`.

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
        "about": {"license": settings.license},
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
    progress: bool,
) -> Manifest:
    """`import_rows` with the header, tokenizer and treatment of bad rows that `settings` give.

    `imported_header` explains `columns` and `top_k`. Raises what it and `import_rows` raise.
    """
    return import_rows(
        rows,
        output,
        header=imported_header(settings, columns=columns, top_k=top_k, source_sha256=source_sha256),
        tokenizer=settings.tokenizer,
        bad_rows=settings.bad_rows,
        progress=progress,
    )


def import_rows(
    rows: RowSource,
    output: str | Path,
    *,
    header: DatasetHeader,
    tokenizer: str | Path,
    bad_rows: Literal["fail", "reject"] = "fail",
    progress: bool = True,
) -> Manifest:
    """Write `rows` as a sealed dataset to `output`, `header.rows_per_unit` sequences per shard; its manifest.

    One unit is in memory at a time: `rows_per_unit * targets of a row * top_k * 8` bytes. `bad_rows`: a sequence that
    cannot become a row ends the import (`fail`; committed units are kept), or is written to the rejects with one of
    `IMPORT_REASONS` (`reject`).

    Raises `HeaderMismatch`, `SourceUnreadable`, `StorageFailed`, and the error of a bad row.
    """
    if len(rows) == 0:
        raise SourceUnreadable("source", found="no row", wanted="at least one")
    store = Store(output)
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
                good, rejects = _split_bad_rows(items, unit, header, bad_rows)
                commit_unit(store, unit.index, rows=good, rejects=rejects, header=header, environment={})
                next_row = unit.first_row + unit.rows
            bar.update(unit.rows)
    return seal(store)


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
    items: Iterator[ImportedRow], unit: Unit, header: DatasetHeader, bad_rows: str
) -> tuple[list[CachedRow], list[Reject]]:
    good: list[CachedRow] = []
    rejects: list[Reject] = []
    for number in range(unit.first_row, unit.first_row + unit.rows):
        item = next(items, None)
        if item is None:
            raise SourceUnreadable(
                "source", found=f"its end at row {number}", wanted="as many rows as its files declare"
            )
        try:
            good.append(_checked(item, header))
        except tuple(IMPORT_REASONS) as error:
            if bad_rows == "fail":
                raise
            rejects.append(Reject(number, item.sample_id, IMPORT_REASONS[type(error)], str(error)))
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
    return item.row


def check_alignment(rows: Iterable[CachedRow], *, fix: str) -> None:
    """Raise `AlignmentDoubtful` if the kept ids contain token `t` or `t + 2` far more often than token `t + 1`.

    Log-probs that are off by one train a student to repeat or skip tokens, without any error. On real text a teacher's
    top 50 contain the next token at about 95 % of the positions, and its neighbors at a fifth of that or less. The
    error is raised if a neighbor is found 1.5 times as often as the next token.
    """
    hits = np.zeros(3, np.int64)
    total = 0
    for row in rows:
        positions = row.positions
        inner = positions < row.token_ids.size - 2
        ids, kept = row.targets.ids[inner], row.targets.kept[inner]
        total += int(inner.sum())
        for offset in range(3):
            token = row.token_ids[positions[inner] + offset]
            hits[offset] += int(((ids == token[:, None]) & kept).any(axis=1).sum())
    best = int(hits.argmax())
    if total >= MIN_POSITIONS and best != 1 and hits[best] > 1.5 * hits[1] + 0.05 * total:
        expected = f"{hits[1] / total:.0%} of the positions hold the next token"
        raise AlignmentDoubtful(
            "alignment",
            found=f"{expected}, {hits[best] / total:.0%} hold {('the token itself', '', 'the token after it')[best]}",
            wanted="distributions of the next token",
            fix=fix,
        )


def check_not_renormalized(rows: Sequence[CachedRow], *, token_count: int, fix: str) -> None:
    """Raise `NotFullSoftmax` if no position has a tail although its least kept id is above `OPEN_PROBABILITY`.

    Log-probs that were scaled to sum to 1 over the kept ids would claim a teacher without a tail, without any error.
    """
    least = np.concatenate(
        [np.where(row.targets.kept, row.targets.logprobs, np.inf).min(axis=1, initial=np.inf) for row in rows]
    )
    log_tail = np.concatenate([row.targets.log_tail for row in rows])
    counts = np.concatenate([row.targets.counts for row in rows])
    is_open = (least > np.log(OPEN_PROBABILITY)) & (counts < token_count)
    if is_open.any() and (log_tail[is_open] < np.log(3 * MIN_TAIL)).all():
        raise NotFullSoftmax(
            "log-probs",
            found=f"a sum of 1 over the kept ids at each of {int(is_open.sum())} positions",
            wanted="log-probs of the full softmax, whose sum over the kept ids is below 1",
            fix=fix,
        )
