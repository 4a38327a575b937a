"""What a unit has cost: trials of it in which a worker died, and what the search for the deadly row has found.

`attempts/000003.json` stands in the dataset directory for each unit over which a worker died. It is a list of trials,
oldest first, and all that is concluded from them (`bisection.py`) is concluded anew: a driver that is killed goes on
where it was. Only the driver writes it. It is no part of the dataset.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coldstill.common.models import FrozenModel, parse_document
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.store import RUN_FOLDER, Store

ATTEMPTS_FOLDER = "attempts"
_WORDS_FOLDER = f"{RUN_FOLDER}/last_words"

Kind = Literal["whole", "probe", "rest", "parts"]


class LastWords(FrozenModel):
    """Why a worker is gone: the `cause` in words that are the same on each machine and in each run, for they go into
    the dataset; the whole `reason`; and whether the engine itself said that memory ran out."""

    cause: str
    reason: str
    out_of_memory: bool = False


class Trial(FrozenModel):
    """One time that a worker was given a unit or a part of it."""

    kind: Kind = Field(description="`whole`: all rows; `probe`: a part, not committed; `rest`, `parts`: afterwards.")
    start: int = Field(ge=0, description="First source row.")
    stop: int = Field(ge=0, description="Source row after the last.")
    worker: str
    alone: bool = Field(description="Whether the worker had no other unit at the time.")
    died_of: LastWords | None = Field(default=None, description="None: it lived.")


class ExcludedRow(FrozenModel):
    """A source row that ends each worker that scores it."""

    source_row: int
    detail: str


class Attempts(FrozenModel):
    """The trials of one unit."""

    unit: int = Field(ge=0)
    trials: tuple[Trial, ...] = ()
    excluded: tuple[ExcludedRow, ...] = Field(
        default=(), description="What the trials prove; for whoever reads the file."
    )


def attempts_name(unit: int) -> str:
    """Name of a unit's file."""
    return f"{ATTEMPTS_FOLDER}/{unit:06d}.json"


def read_attempts(store: Store, unit: int) -> Attempts:
    """The trials of a unit; none where no worker died over it. Raises `CommitDamaged`, `StorageFailed`."""
    name = attempts_name(unit)
    try:
        data = store.read(name)
    except FileNotFoundError:
        return Attempts(unit=unit)
    return parse_document(data, model=Attempts, where=name, error=CommitDamaged)


def write_attempts(store: Store, attempts: Attempts) -> None:
    """Put a unit's trials in place of those that are there. Raises `StorageFailed`."""
    store.put(attempts_name(attempts.unit), _to_bytes(attempts))


def units_with_attempts(store: Store) -> set[int]:
    """Units over which a worker died, from the names alone."""
    stems = (name.removesuffix(".json") for name in store.names(ATTEMPTS_FOLDER) if name.endswith(".json"))
    return {int(stem) for stem in stems if stem.isascii() and stem.isdigit()}


def write_last_words(store: Store, worker_key: str, words: LastWords) -> None:
    """Say why a worker ends itself, for the driver to find. Raises `StorageFailed`."""
    store.put(f"{_WORDS_FOLDER}/{worker_key}.json", _to_bytes(words))


def read_last_words(store: Store, worker_key: str) -> LastWords | None:
    """What a dead worker said; none where it was killed. Raises `CommitDamaged`, `StorageFailed`."""
    name = f"{_WORDS_FOLDER}/{worker_key}.json"
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    return parse_document(data, model=LastWords, where=name, error=CommitDamaged)


def _to_bytes(document: FrozenModel) -> bytes:
    return (document.model_dump_json(indent=2) + "\n").encode()
