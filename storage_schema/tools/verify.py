"""`coldstill verify`: does a dataset hold what it says? A path in, findings out; no finding means that it does.

Always: every file that the manifest names is there with its size and digest, and the tokenizer inside is the header's.
Deep: every row is decoded too, and every decoded value obeys the laws of `rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from storage_schema.commits import FileRecord
from storage_schema.dataset import Dataset, open_dataset
from storage_schema.errors import ColdstillError, ShardDamaged, TokenizerMismatch
from storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER, fingerprint_bytes


class Finding(NamedTuple):
    """Something wrong: in which file, the named error, and its message."""

    where: str
    error: str
    message: str


def verify(root: str | Path, *, deep: bool = False, progress: bool = True) -> list[Finding]:
    """All findings. Raises `DatasetNotFound` or `DatasetNotSealed` where there is nothing to check."""
    dataset = open_dataset(root)
    checks: list[tuple[str, Callable[[], object]]] = []
    for file in dataset.manifest.files:
        is_tokenizer = file.name == f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}"
        checks.append((file.name, partial(_check_tokenizer if is_tokenizer else Dataset.read_file, dataset, file)))
    for index, shard in enumerate(dataset.shards):
        if deep:
            checks.append((shard.file.name, partial(_check_rows, dataset, index)))
        else:
            checks.append((shard.file.name, partial(dataset.read_file, shard.file)))
    findings = []
    for where, run_check in tqdm(checks, desc="verify", unit=" files", disable=not progress):
        try:
            run_check()
        except ColdstillError as error:
            findings.append(Finding(where, type(error).__name__, str(error)))
    return findings


def _check_tokenizer(dataset: Dataset, file: FileRecord) -> None:
    facts = fingerprint_bytes(dataset.read_file(file), where=file.name)
    if facts.fingerprint != dataset.header.tokenizer_fingerprint:
        raise TokenizerMismatch(file.name, found=facts.fingerprint, wanted=dataset.header.tokenizer_fingerprint)


def _check_rows(dataset: Dataset, index: int) -> None:
    record = dataset.shards[index]
    tokens = targets = 0
    for row in dataset.shard_file(index).rows():
        row.check(token_count=dataset.header.token_count, label_slack=dataset.codec.label_slack(row.targets.log_tail))
        tokens += row.token_ids.size
        targets += row.targets.positions
    for name, found, wanted in (("tokens", tokens, record.tokens), ("targets", targets, record.targets)):
        if found != wanted:
            raise ShardDamaged(f"{record.file.name}: {name}", found=found, wanted=wanted)
