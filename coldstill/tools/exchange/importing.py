"""The common end of every import: rows of another tool in, a sealed dataset out, through the commit protocol.

A start does only what no earlier one has committed: kill it when you like. A changed setting on an existing output is a
`HeaderMismatch` that names the field; the source's content and the settings that decide what its bytes mean are one
field, `source_sha256`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from pydantic import ValidationError
from tqdm import tqdm

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.commits import Reject, commit_unit, committed_units
from coldstill.storage_schema.errors import InvalidHeader, InvalidRow, InvalidTargets
from coldstill.storage_schema.header import HEADER_NAME, Codec, DatasetHeader, TeacherFacts
from coldstill.storage_schema.manifest import MANIFEST_NAME, Manifest, read_manifest, seal
from coldstill.storage_schema.plan import PLAN_NAME, Plan, Unit, plan_from_bytes, plan_to_bytes
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER, fingerprint

from .errors import SourceUnreadable, UnusableRow

BadRows = Literal["fail", "reject"]
Fidelity = Literal["fine", "coarse", "exact"]

UNKNOWN = "unknown"
"""What the header says of a teacher's weights and data types, which no peer stores."""


class Item(NamedTuple):
    """One sequence of a source: its row, or why it cannot be one."""

    sample_id: str
    row: CachedRow | ColdstillError


class RowSource(Protocol):
    """Sequences by number, so that a second start can begin where the first one ended."""

    def __len__(self) -> int:
        """How many sequences there are, found without decoding any."""

    def items(self, start: int) -> Iterator[Item]:
        """Sequences from number `start` on."""


def imported_header(
    tokenizer: str | Path,
    *,
    teacher: str,
    revision: str | None,
    vocab_size: int | None,
    top_k: int,
    fidelity: Fidelity,
    max_length: int,
    rows_per_unit: int,
    source_sha256: str,
    licence: str | None,
) -> DatasetHeader:
    """The header of an import with the `tokenizer.json` in the local folder `tokenizer`.

    `vocab_size`: logit columns of the teacher, by default the ids of its tokenizer. `top_k` is cut to those ids.
    `fidelity`: preset of the codec that the values are stored with.
    Raises `TokenizerNotFound`, `InvalidHeader`.
    """
    facts = fingerprint(tokenizer)
    top_k = min(top_k, facts.token_count)
    fields = {
        "codec": Codec.preset(fidelity, top_k=top_k),
        "teacher": TeacherFacts(
            name=teacher, revision=revision, weights_fingerprint=UNKNOWN, dtype=UNKNOWN, head_dtype=UNKNOWN
        ),
        "tokenizer_fingerprint": facts.fingerprint,
        "vocab_size": max(vocab_size or 0, facts.token_count),
        "token_count": facts.token_count,
        "top_k": top_k,
        "min_prob": 0.0,
        "draws": 0,
        "kept_draws": 0,
        "draw_seed": 0,
        "tail": "derived",
        "mode": "imported",
        "loss_on": "given",
        "max_length": max_length,
        "over_long": "reject",
        "rows_per_unit": rows_per_unit,
        "source_sha256": source_sha256,
        "licence": licence,
    }
    try:
        return DatasetHeader.model_validate(fields)
    except ValidationError as failure:
        first = failure.errors()[0]
        field = ".".join(map(str, first["loc"])) or "header"
        raise InvalidHeader(f"import: {field}", found=str(first["input"])[:200], wanted=first["msg"]) from None


def import_rows(
    rows: RowSource,
    output: str | Path,
    *,
    header: DatasetHeader,
    tokenizer: str | Path,
    bad_rows: BadRows = "fail",
    progress: bool = True,
) -> Manifest:
    """Write the sealed dataset of `rows` to `output`, `header.rows_per_unit` sequences to a shard; its manifest.

    One unit is in memory at a time: `rows_per_unit * targets of a row * top_k * 8` bytes. `bad_rows`: a sequence that
    cannot be a row ends the import (`fail`, nothing that was committed is lost) or stands in the rejects with the
    reason (`reject`). Raises `HeaderMismatch`, `SourceUnreadable`, `StorageFailed`, and what a bad row raises.
    """
    if len(rows) == 0:
        raise SourceUnreadable("source", found="no row", wanted="at least one")
    store = Store(output)
    units = _begin(store, rows, header, Path(tokenizer))
    if store.exists(MANIFEST_NAME):
        return read_manifest(store)[0]
    done = committed_units(store)
    items: Iterator[Item] = iter(())
    reached = -1
    with tqdm(total=len(rows), desc="import", unit=" rows", disable=not progress) as bar:
        for unit in units:
            if unit.index not in done:
                if reached != unit.first_row:
                    items = rows.items(unit.first_row)
                good, rejects = _sort_out(items, unit, header, bad_rows)
                commit_unit(store, unit.index, rows=good, rejects=rejects, header=header, environment={})
                reached = unit.first_row + unit.rows
            bar.update(unit.rows)
    return seal(store)


def _begin(store: Store, rows: RowSource, header: DatasetHeader, tokenizer: Path) -> Plan:
    """Header, tokenizer files and plan, made once and then held against every later start."""
    store.require_writable()
    if not store.create(HEADER_NAME, header.to_bytes()):
        DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME).require_equal(
            header,
            where="the import",
            fix=f"{store.url} was begun with another value: put it back, or choose another output",
        )
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            store.create(f"{TOKENIZER_FOLDER}/{name}", (tokenizer / name).read_bytes())
    if not store.exists(PLAN_NAME):
        size = header.rows_per_unit
        starts = range(0, len(rows), size)
        plan = [Unit(i, start, start, min(size, len(rows) - start)) for i, start in enumerate(starts)]
        store.create(PLAN_NAME, plan_to_bytes(plan))
    return plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)


def _sort_out(
    items: Iterator[Item], unit: Unit, header: DatasetHeader, bad_rows: BadRows
) -> tuple[list[CachedRow], list[Reject]]:
    good: list[CachedRow] = []
    rejects: list[Reject] = []
    for number in range(unit.first_row, unit.first_row + unit.rows):
        item = next(items, None)
        if item is None:
            raise SourceUnreadable("source", found=f"its end at row {number}", wanted="as many rows as its files say")
        try:
            good.append(_checked(item, header))
        except (UnusableRow, InvalidRow, InvalidTargets) as error:
            if bad_rows == "fail":
                raise
            rejects.append(Reject(number, item.sample_id, type(error).__name__, str(error)))
    return good, rejects


def _checked(item: Item, header: DatasetHeader) -> CachedRow:
    if isinstance(item.row, ColdstillError):
        raise item.row
    if item.row.token_ids.size > header.max_length:
        raise UnusableRow(
            item.sample_id,
            found=f"{item.row.token_ids.size} tokens",
            wanted=f"at most {header.max_length}",
            fix="raise max_length, or import with bad rows rejected",
        )
    item.row.check(token_count=header.token_count)
    return item.row
