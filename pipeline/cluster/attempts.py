"""The attempts of units that killed workers, and the crash reports of dead workers.

`attempts/000003.json` lists the trials of unit 3, oldest first. All conclusions (`poison_search.py`) are computed from
the trials again, so a driver that is killed resumes its search. Only the driver writes these files; they are not part
of the dataset.
"""

from __future__ import annotations

from contextlib import suppress

from pydantic import ConfigDict, Field

from coldstill.common.models import FrozenModel, parse_document
from coldstill.pipeline.worker import ExcludedRow, TaskKind
from coldstill.storage_schema.errors import CommitDamaged
from coldstill.storage_schema.store import RUN_FOLDER, Store

ATTEMPTS_FOLDER = "attempts"
_CRASH_REPORTS_FOLDER = f"{RUN_FOLDER}/last_words"  # the folder's name on disk, which may not change


class CrashReport(FrozenModel):
    """Why a worker ended."""

    cause: str = Field(description="The cause without details of the machine or the run, because it is committed.")
    reason: str = Field(description="The cause with all details.")
    out_of_memory: bool = Field(default=False, description="Whether the engine reported that memory ran out.")


class Trial(FrozenModel):
    """One run of a unit, or of a part of it, on a worker."""

    model_config = ConfigDict(populate_by_name=True)

    kind: TaskKind = Field(description="See `poison_search.py`; a `probe` is not committed.")
    start: int = Field(ge=0, description="First source row.")
    stop: int = Field(ge=0, description="Source row after the last.")
    worker: str
    isolated: bool = Field(alias="alone", description="Whether the worker had no other unit at the time.")
    died_of: CrashReport | None = Field(default=None, description="Why the worker died; None if it survived.")


class Attempts(FrozenModel):
    """The trials of one unit."""

    unit: int = Field(ge=0)
    trials: tuple[Trial, ...] = ()
    excluded: tuple[ExcludedRow, ...] = Field(
        default=(), description="The poison rows found so far, for people who read the file; never read back."
    )


class AttemptStore:
    """The attempts of all units of a dataset directory."""

    def __init__(self, store: Store):
        self._store = store

    def read(self, unit: int) -> Attempts:
        """The trials of a unit; none if it killed no worker, or if its file is damaged: then its search begins again.

        Raises `StorageFailed`.
        """
        name = attempts_name(unit)
        try:
            data = self._store.read(name)
        except FileNotFoundError:
            return Attempts(unit=unit)
        with suppress(CommitDamaged):
            return parse_document(data, model=Attempts, where=name, error=CommitDamaged)
        return Attempts(unit=unit)

    def write(self, attempts: Attempts) -> None:
        """Replace the trials of a unit. Raises `StorageFailed`."""
        self._store.put(attempts_name(attempts.unit), _to_bytes(attempts))

    def units(self) -> set[int]:
        """Units that were running when a worker died, from the file names alone. Raises `StorageFailed`."""
        names = self._store.names(ATTEMPTS_FOLDER)
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return {int(stem) for stem in stems if stem.isascii() and stem.isdigit()}


def attempts_name(unit: int) -> str:
    """Name of a unit's file."""
    return f"{ATTEMPTS_FOLDER}/{unit:06d}.json"


def write_crash_report(store: Store, worker_key: str, report: CrashReport) -> None:
    """Write the crash report of a worker, for the driver to read. Raises `StorageFailed`."""
    store.put(f"{_CRASH_REPORTS_FOLDER}/{worker_key}.json", _to_bytes(report))


def read_crash_report(store: Store, worker_key: str) -> CrashReport | None:
    """The report of a dead worker; None if it was killed, or its report is damaged. Raises `StorageFailed`."""
    name = f"{_CRASH_REPORTS_FOLDER}/{worker_key}.json"
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    with suppress(CommitDamaged):
        return parse_document(data, model=CrashReport, where=name, error=CommitDamaged)
    return None


def _to_bytes(document: FrozenModel) -> bytes:
    return (document.model_dump_json(indent=2, by_alias=True) + "\n").encode()
