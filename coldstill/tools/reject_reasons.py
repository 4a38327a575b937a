"""Reasons why imports reject rows, and the count of all reasons of a dataset.

A reject is a line of `rejects/*.jsonl`. A capture writes its own reasons, which `pipeline` lists; merge copies those of
its sources, and split and subset carry none.
"""

from __future__ import annotations

import json
from collections import Counter

from coldstill.common.errors import ColdstillError
from coldstill.common.models import too_dense
from coldstill.storage_schema.commits import REJECTS_FOLDER
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileDamaged, InvalidRow, InvalidTargets

from .errors import UnusableRow

UNUSABLE_ROW = UnusableRow.__name__
"""The source row lacks a column or a value, holds values of another type, or is too long."""

INVALID_ROW = InvalidRow.__name__
"""The tokens, target spans and targets of the row do not fit together."""

INVALID_TARGETS = InvalidTargets.__name__
"""The teacher's values at some position are not a distribution."""

IMPORT_REASONS: dict[type[ColdstillError], str] = {
    UnusableRow: UNUSABLE_ROW,
    InvalidRow: INVALID_ROW,
    InvalidTargets: INVALID_TARGETS,
}
"""The errors that reject a row of an import with `bad_rows="reject"`, and their reasons. Every other error ends it."""

OTHER_REASONS = "other reasons"
"""Counts the rejects whose reason is met after `MAX_REASONS` others."""

MAX_REASONS = 100
_MAX_FILE_BYTES = 256 << 20
_MAX_REASON_CHARS = 200


def count_reasons(dataset: Dataset) -> Counter[str]:
    """Rejected rows by reason, with one file of rejects in memory at a time. Raises `FileMissing`, `FileDamaged`."""
    reasons: Counter[str] = Counter()
    for file in dataset.manifest.files:
        if not file.name.startswith(f"{REJECTS_FOLDER}/"):
            continue
        if file.bytes > _MAX_FILE_BYTES:
            raise FileDamaged(file.name, found=f"{file.bytes} bytes", wanted=f"at most {_MAX_FILE_BYTES}")
        for number, line in enumerate(dataset.read_file(file).splitlines(), start=1):
            reason = _reason(line, where=f"{file.name}, line {number}")
            reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else OTHER_REASONS] += 1
    return reasons


def _reason(line: bytes, *, where: str) -> str:
    if found := too_dense(line):
        raise FileDamaged(where, found=found, wanted="a JSON object with a reason")
    try:
        reason = json.loads(line)["reason"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileDamaged(where, found=f"{type(error).__name__}", wanted="a JSON object with a reason") from None
    if not isinstance(reason, str):
        raise FileDamaged(f"{where}: reason", found=type(reason).__name__, wanted="text")
    return reason[:_MAX_REASON_CHARS]
