"""Why source rows were rejected: a dataset in, the number of rows by reason out, from its `rejects/*.jsonl`."""

from __future__ import annotations

import json
from collections import Counter

from coldstill.storage_schema.commits import REJECTS_FOLDER
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileDamaged

OTHER = "other reasons"
"""Where more than `MAX_REASONS` reasons are found, the later ones are counted together."""

MAX_REASONS = 100
_MAX_FILE_BYTES = 256 << 20


def count_reasons(dataset: Dataset) -> Counter[str]:
    """Rejected rows by reason, one file of rejects in memory at a time. Raises `FileMissing`, `FileDamaged`."""
    reasons: Counter[str] = Counter()
    for file in dataset.manifest.files:
        if not file.name.startswith(f"{REJECTS_FOLDER}/"):
            continue
        if file.bytes > _MAX_FILE_BYTES:
            raise FileDamaged(file.name, found=f"{file.bytes} bytes", wanted=f"at most {_MAX_FILE_BYTES}")
        for number, line in enumerate(dataset.read_file(file).splitlines(), start=1):
            reason = _reason(line, where=f"{file.name}, line {number}")
            reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else OTHER] += 1
    return reasons


def _reason(line: bytes, *, where: str) -> str:
    try:
        reason = json.loads(line)["reason"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileDamaged(where, found=f"{type(error).__name__}", wanted="a JSON object with a reason") from None
    if not isinstance(reason, str):
        raise FileDamaged(f"{where}: reason", found=type(reason).__name__, wanted="text")
    return reason
