"""`coldstill verify`: check a dataset against its manifest, and list what is wrong.

Always: each file that the manifest lists exists with its size and digest, the tokenizer matches the header, the plan
matches the shards, and the rejects are as many as the manifest counts. Deep: each row is decoded, each decoded value
passes the checks of `rows.py`, and the media and the faithfulness sample fit the rows: digests, types, placeholders,
and no file that no row needs.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coldstill.common.errors import ColdstillError
from coldstill.common.progress import tqdm
from coldstill.common.visible import visible
from coldstill.storage_schema.commits import REJECTS_FOLDER
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import (
    CommitDamaged,
    FileDamaged,
    FileMissing,
    ForeignFile,
    ShardDamaged,
    TokenizerMismatch,
)
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, storage_kl
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, is_dataset_file
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.storage_schema.rows import MEDIA_FOLDER, CachedRow
from coldstill.storage_schema.tokenizer import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    fingerprint_bytes,
    without_code,
)
from coldstill.storage_schema.verified_files import SHARDS_FOLDER, FileRecord, check_content, open_file

from .errors import DuplicateIds
from .media_checks import MediaChecks

MAX_FINDINGS = 10_000
"""Maximum number of findings: a manifest can list 300,000 files that do not exist."""

_FINDINGS_PER_SHARD = 20
_READERS = 8
_BATCH = 1024
_IDS_LISTED, _ID_CHARS = 3, 200
_TOKENIZER = f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}"
_SETTINGS = f"{TOKENIZER_FOLDER}/{TOKENIZER_CONFIG}"
_READ = {_TOKENIZER, _SETTINGS, PLAN_NAME}


class Finding(NamedTuple):
    """Something wrong in a file: the name of the file, the name of the error, and its message."""

    where: str
    error: str
    message: str

    @property
    def line(self) -> str:
        """The finding on one line. Quoted text of the dataset cannot control the terminal."""
        return visible(f"{self.error}: " + " | ".join(part.strip() for part in self.message.splitlines()))


def verify(root: str | Path, *, deep: bool = False, progress: bool = True) -> list[Finding]:
    """All findings of the dataset at `root`, at most 20 per shard; the first `MAX_FINDINGS` in all.

    Raises `DatasetNotFound`, `DatasetNotSealed`, and `CommitDamaged` or `InvalidHeader` if it cannot be opened.
    """
    dataset = open_dataset(root)
    media, foreign = MediaChecks(dataset), {*dataset.manifest.foreign_names}
    ids, rejected = array("Q"), {f"{REJECTS_FOLDER}/{shard.unit:06d}": shard.rejected for shard in dataset.shards}
    files = [
        _Check(file.name, file.bytes, partial(_check_file, dataset, file, foreign, media, rejected))
        for file in dataset.manifest.files
        if file.name != FAITHFULNESS_NAME
    ]
    checks = [
        *(check for check in files if not check.is_of_media),
        _Check(REJECTS_FOLDER, 0, partial(_check_unlisted, rejected)),
        _Check(FAITHFULNESS_NAME, 0, partial(_check_sample, dataset, deep)),
        *(
            _Check(shard.file.name, shard.file.bytes, partial(_check_shard, dataset, index, media, deep, ids))
            for index, shard in enumerate(dataset.shards)
        ),
    ]
    findings: list[Finding] = []
    total = sum(check.bytes for check in files) + sum(shard.file.bytes for shard in dataset.shards)
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=not progress) as bar:
        for check, found in _results([check for check in files if check.is_of_media], checks):
            findings += found
            bar.update(check.bytes)
            if findings:
                bar.set_postfix_str("1 finding" if len(findings) == 1 else f"{len(findings):,} findings", refresh=False)
            if len(findings) >= MAX_FINDINGS:
                return findings[:MAX_FINDINGS]
    if deep and not findings:  # a shard that cannot be read hides what its rows refer to
        findings += [_finding(error.what, error) for error in itertools.islice(media.unused(), MAX_FINDINGS)]
    if deep and not findings and _has_own_ids(dataset):
        findings += [_finding(SHARDS_FOLDER, error) for error in _repeated_ids(dataset, ids)]
    return findings


class _Check(NamedTuple):
    """The check of a file: its name, its size, and what raises or gives the errors."""

    name: str
    bytes: int
    errors: Callable[[], Iterator[ColdstillError]]

    @property
    def is_of_media(self) -> bool:
        return self.name.startswith(f"{MEDIA_FOLDER}/")

    def run(self) -> tuple[_Check, list[Finding]]:
        findings = []
        try:
            for error in self.errors():
                findings.append(_finding(self.name, error))
        except ColdstillError as error:
            findings.append(_finding(self.name, error))
        return self, findings


def _results(media: Sequence[_Check], others: Sequence[_Check]) -> Iterator[tuple[_Check, list[Finding]]]:
    """The findings of each check. Media files are many and small, and a store responds in 30 ms: some at a time."""
    with ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(media), _BATCH):
            yield from readers.map(_Check.run, media[start : start + _BATCH])
    yield from map(_Check.run, others)


def foreign_file(name: str) -> ForeignFile:
    """The error for a name in the manifest that the format does not have."""
    return ForeignFile(
        name,
        found="a name that no file of a dataset has",
        wanted=f"the header, the plan, shards, rejects, media, or one of {', '.join(TOKENIZER_FILES)} in "
        f"{TOKENIZER_FOLDER}/",
        fix="`coldstill subset SOURCE OUTPUT` makes a dataset of the same rows without this file",
    )


def _finding(name: str, error: ColdstillError) -> Finding:
    return Finding(name, type(error).__name__, str(error))


def _is_row_for_row(header: DatasetHeader) -> bool:
    """Whether each source row becomes one row or one reject: one answer per row, and no split or joined documents."""
    answers = (header.sampling or {}).get("n", 1)
    return answers == 1 and header.over_long != "split" and header.documents != "concat"


def _check_file(
    dataset: Dataset, file: FileRecord, foreign: Container[str], media: MediaChecks, rejected: dict[str, int]
) -> Iterator[ColdstillError]:
    """Check a file other than a shard: its name, its digest, and its content if the format defines it."""
    if file.name in foreign:
        yield foreign_file(file.name)
    if file.name not in _READ:
        if file.name.startswith(f"{REJECTS_FOLDER}/") and file.name not in foreign:
            yield from _check_rejects(dataset, file, rejected)
        else:
            (media if file.name.startswith(f"{MEDIA_FOLDER}/") else dataset).check_file(file)
        return
    data = dataset.read_file(file)
    if file.name == _TOKENIZER:
        facts = fingerprint_bytes(data, where=file.name)
        if facts.fingerprint != dataset.header.tokenizer_fingerprint:
            yield TokenizerMismatch(file.name, found=facts.fingerprint, wanted=dataset.header.tokenizer_fingerprint)
    elif file.name == _SETTINGS:
        without_code({TOKENIZER_CONFIG: data}, where=TOKENIZER_FOLDER)
    elif file.name == PLAN_NAME:
        planned = [unit.rows for unit in plan_from_bytes(data, where=file.name)]
        found = [shard.rows + shard.rejected for shard in dataset.shards]
        if len(planned) != len(found) or (_is_row_for_row(dataset.header) and planned != found):
            yield CommitDamaged(
                f"{file.name}: rows",
                found=f"{sum(planned)} in {len(planned)} units",
                wanted=f"{sum(found)} in {len(found)}",
            )


def _check_rejects(dataset: Dataset, file: FileRecord, rejected: dict[str, int]) -> Iterator[ColdstillError]:
    """Check the rejects of a unit: the digest, and that they are a line for each row that the manifest counts."""
    wanted, lines, end = rejected.pop(file.name.partition("-")[0], 0), 0, b"\n"

    def count(block: bytes) -> None:
        nonlocal lines, end
        lines, end = lines + block.count(b"\n"), block[-1:]

    with open_file(dataset.store, file) as source:
        check_content(dataset.store, file, source, write=count)
    lines += end != b"\n"
    if lines != wanted:
        yield FileDamaged(f"{file.name}: lines", found=lines, wanted=f"{wanted}, the rejected rows in {MANIFEST_NAME}")


def _check_unlisted(rejected: dict[str, int]) -> Iterator[ColdstillError]:
    """Check that no unit has rejected rows without a file."""
    for name, count in rejected.items():
        if count:
            yield FileMissing(
                f"{name}-*.jsonl", found=f"no such file in {MANIFEST_NAME}", wanted=f"{count} rejected rows"
            )


def _check_sample(dataset: Dataset, deep: bool) -> Iterator[ColdstillError]:
    """Check the faithfulness sample, if there is one: its checksums, and deep, that its positions fit their rows."""
    sample = sorted(dataset.faithfulness_sample(), key=lambda exact: exact[:2])
    row, place = None, (-1, -1)
    for exact in sample if deep else ():
        if exact.unit >= len(dataset.shards) or exact.row >= dataset.shards[exact.unit].rows:
            yield FileDamaged(
                FAITHFULNESS_NAME, found=f"row {exact.row} of unit {exact.unit}", wanted="a row of the dataset"
            )
            return
        if row is None or place != exact[:2]:  # the positions of a row are adjacent: decode it once
            row, place = dataset.row(dataset.first_row(exact.unit) + exact.row), exact[:2]
        if exact.target >= row.targets.positions:
            yield FileDamaged(
                FAITHFULNESS_NAME, found=f"target {exact.target} of {row.sample_id!r}", wanted="a target of that row"
            )
            return
        storage_kl(exact, row.targets)


def _has_own_ids(dataset: Dataset) -> bool:
    """Whether each id must be there once: merged and imported rows have the ids of their sources."""
    return dataset.header.mode != "imported" and not dataset.manifest.derived_from


def _repeated_ids(dataset: Dataset, hashes: array[int]) -> Iterator[ColdstillError]:
    """One error for all ids that several rows have, from the hashes of all ids: 8 bytes per row."""
    ordered = np.frombuffer(hashes, np.uint64)
    ordered.sort()
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    counts, starts = Counter[bytes](), dict[bytes, str]()
    for row in dataset.rows() if repeated else ():
        # Their digests and starts: a row of 100 bytes can have an id of a megabyte.
        if _hash_of(row.sample_id) in repeated:
            digest = hashlib.blake2b(row.sample_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            counts[digest] += 1
            starts.setdefault(digest, row.sample_id[:_ID_CHARS])
    found = [(starts[digest], count) for digest, count in counts.most_common() if count > 1]
    if found:
        listed = ", ".join(f"{start!r} {count} times" for start, count in found[:_IDS_LISTED])
        yield DuplicateIds(
            "sample ids",
            found=f"{len(found):,} ids that several rows have, such as {listed}",
            wanted="another id for each row",
            fix="capture it again with source.duplicate_ids: number",
        )


def _hash_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _check_shard(
    dataset: Dataset, index: int, media: MediaChecks, deep: bool, ids: array[int]
) -> Iterator[ColdstillError]:
    """Check a shard: its digest, or deep, its rows one by one, so that a damaged row does not hide the next."""
    record = dataset.shards[index]
    if not is_dataset_file(record.file.name):
        yield foreign_file(record.file.name)
    if not deep:
        dataset.check_file(record.file)
        return
    shard = dataset.shard_file(index)
    tokens = targets = found = 0
    for number in range(len(shard)):
        try:
            row = shard.row(number)
            _check_row(dataset, row, media)
            ids.append(_hash_of(row.sample_id))
            tokens += row.token_ids.size
            targets += row.targets.positions
        except ColdstillError as error:
            yield error if error.what.startswith(record.file.name) else error.at(f"{record.file.name}, row {number}")
            found += 1
            if found == _FINDINGS_PER_SHARD:
                return
    for name, counted, wanted in (("tokens", tokens, record.tokens), ("targets", targets, record.targets)):
        if counted != wanted and not found:
            yield ShardDamaged(f"{record.file.name}: {name}", found=counted, wanted=wanted)


def _check_row(dataset: Dataset, row: CachedRow, media: MediaChecks) -> None:
    """Check a row by `rows.py`, and its media."""
    dataset.check_row(row)
    media.check_row(row)
