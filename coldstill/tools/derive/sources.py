"""The source datasets of a merge, split or subset as one sequence of shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from coldstill.storage_schema.commits import REJECTS_FOLDER
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import CommitDamaged, FileDamaged, FileMissing, TokenizerMismatch
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, ExactPosition
from coldstill.storage_schema.manifest import ShardRecord
from coldstill.storage_schema.rows import MAX_MEDIA_BYTES, MEDIA_FOLDER
from coldstill.storage_schema.shard import ShardFile
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER, fingerprint_bytes
from coldstill.storage_schema.verified_files import FileRecord

MAX_SAMPLE = 20_000
MAX_SAMPLE_BYTES = 128 << 20
"""Limits of the faithfulness sample of several datasets together: readers reject one that is far larger."""

_CACHED_FOLDERS = 8


class SourceShard(NamedTuple):
    """A shard of dataset number `source`; its first row is number `first_row` among the rows of all sources."""

    source: int
    record: ShardRecord
    first_row: int


class Sources:
    """Several datasets; `shards` holds those of the first dataset, then those of the second, and so on."""

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = tuple(datasets)
        self.shards: list[SourceShard] = []
        rows = 0
        for source, dataset in enumerate(self.datasets):
            for record in dataset.shards:
                self.shards.append(SourceShard(source, record, rows))
                rows += record.rows
        self.rows = rows
        # Cached: needed for each shard and each media file, and a manifest can list very many files.
        self.folder = lru_cache(maxsize=_CACHED_FOLDERS)(self._folder)
        self._sample = lru_cache(maxsize=1)(self._read_sample)
        self._rejects = lru_cache(maxsize=1)(self._rejects_by_unit)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the datasets, in order."""
        return tuple(dataset.dataset_id for dataset in self.datasets)

    def open(self, shard: SourceShard) -> tuple[bytes, ShardFile]:
        """The bytes of a shard, verified against its digest, and a reader of them.

        Raises `ShardMissing`, `ShardDamaged`, `HeaderMismatch`.
        """
        dataset = self.datasets[shard.source]
        data = dataset.read_file(shard.record.file)
        return data, dataset.open_bytes(data, shard.record)

    def rejects(self, shard: SourceShard) -> bytes | None:
        """The file of a shard's rejects, if there is one. Raises `FileMissing`, `FileDamaged`."""
        file = self._rejects(shard.source).get(f"{shard.record.unit:06d}")
        return self.datasets[shard.source].read_file(file) if file else None

    def sample(self, shard: SourceShard) -> list[ExactPosition]:
        """The positions of a shard in the faithfulness sample of its dataset, evenly subsampled if the samples of all
        sources together exceed `MAX_SAMPLE`. Raises `FileMissing`, `FileDamaged`."""
        return self._sample(shard.source).get(shard.record.unit, [])

    def media_file(self, source: int, name: str) -> bytes:
        """The content of a media file that a row refers to. Raises `FileMissing`, `FileDamaged`."""
        return self.datasets[source].read_file(self.media_record(source, name), at_most=MAX_MEDIA_BYTES)

    def media_record(self, source: int, name: str) -> FileRecord:
        """The record of a media file that a row refers to. Raises `FileMissing`."""
        file = self.folder(source, MEDIA_FOLDER).get(name)
        if file is None:
            raise FileMissing(
                f"{self.datasets[source].store.url}: {name[:200]}",
                found="no such file in the manifest",
                wanted="the file that a row refers to",
                fix="run `coldstill verify --deep` on the source",
            )
        return file

    def tokenizer(self) -> dict[str, bytes]:
        """The tokenizer files of the first dataset, by name: those of `TOKENIZER_FILES`, without code to load.

        Raises `TokenizerMismatch` if the tokenizer of any dataset is not the one of its header, `TokenizerNotFound`,
        `FileMissing`, `FileDamaged`.
        """
        for dataset in self.datasets:
            data = dataset.tokenizer_files().get(TOKENIZER_FILE)
            if data is None:
                continue
            where = f"{dataset.store.url}/{TOKENIZER_FOLDER}/{TOKENIZER_FILE}"
            found = fingerprint_bytes(data, where=where).fingerprint
            if found != dataset.header.tokenizer_fingerprint:
                raise TokenizerMismatch(where, found=found, wanted=dataset.header.tokenizer_fingerprint)
        files = self.datasets[0].tokenizer_files()
        return {f"{TOKENIZER_FOLDER}/{name}": data for name, data in files.items()}

    def _folder(self, source: int, folder: str) -> dict[str, FileRecord]:
        """The files of a folder that the manifest of dataset number `source` lists. Raises `CommitDamaged`."""
        dataset = self.datasets[source]
        foreign = {*dataset.manifest.foreign_names}
        listed = [file for file in dataset.manifest.files if file.name.startswith(f"{folder}/")]
        files = {file.name: file for file in listed if folder != MEDIA_FOLDER or file.name not in foreign}
        for name in files:
            if len(PurePosixPath(name).parts) != 2:
                raise CommitDamaged(f"{dataset.store.url}: files", found=name[:200], wanted=f"files in {folder}/")
        return files

    def _rejects_by_unit(self, source: int) -> dict[str, FileRecord]:
        files = self.folder(source, REJECTS_FOLDER)
        return {PurePosixPath(name).name.partition("-")[0]: file for name, file in files.items()}

    def _read_sample(self, source: int) -> dict[int, list[ExactPosition]]:
        dataset = self.datasets[source]
        where, sample = f"{dataset.store.url}/{FAITHFULNESS_NAME}", dataset.faithfulness_sample()
        rows = {record.unit: record.rows for record in dataset.shards}
        by_unit: dict[int, list[ExactPosition]] = {}
        for position in self._subsampled(sample):
            if position.row >= rows.get(position.unit, 0):
                raise FileDamaged(
                    where, found=f"row {position.row} of unit {position.unit}", wanted="a row of the dataset"
                )
            by_unit.setdefault(position.unit, []).append(position)
        return by_unit

    def _subsampled(self, sample: list[ExactPosition]) -> list[ExactPosition]:
        per_position = 8 * self.datasets[0].header.top_k + 64
        share = max(1, min(MAX_SAMPLE, MAX_SAMPLE_BYTES // per_position) // len(self.datasets))
        if len(self.datasets) == 1 or len(sample) <= share:
            return sample
        return [sample[place] for place in ((2 * np.arange(share) + 1) * len(sample) // (2 * share)).tolist()]
