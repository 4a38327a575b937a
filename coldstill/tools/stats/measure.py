"""`coldstill stats`: measure a dataset, as `Stats` that can be added and written as JSON.

Every shard is read once and verified against its digest, and every target is decoded.
Shape letters: `N` target positions, `K` teacher top-k. All logs are natural.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, computed_field

from coldstill.common.images import ENDINGS
from coldstill.common.progress import tqdm
from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import FileMissing, ShardDamaged
from coldstill.storage_schema.rows import LOG_FLOOR, CachedRow
from coldstill.storage_schema.shard import PLAIN_COLUMNS, ShardFile
from coldstill.tools.stats.histogram import ENTROPY, LOGPROB, MASS, RANK, WHOLE, Histogram, Scale, Tally

FOOTERS = "footers"
"""In `column_bytes`: the bytes of a shard outside its columns: the footer, which holds the header, and magic bytes."""

SCALES: dict[str, Scale] = {
    "entropy": ENTROPY,
    "tail_mass": MASS,
    "label_rank": RANK,
    "label_logprob": LOGPROB,
    "kept_ids": WHOLE,
    "draws": WHOLE,
    "row_tokens": WHOLE,
    "row_targets": WHOLE,
    "row_media": WHOLE,
}
"""The histograms of `Stats` and their bins."""

_BLOCK_ENTRIES = 1 << 18
"""Entries (positions times K) per block. Blocks that fit a core's cache are several times faster than long rows."""


class Stats(BaseModel):
    """Statistics of one dataset, or of several together."""

    model_config = ConfigDict(frozen=True)

    dataset_ids: tuple[str, ...] = Field(description="Ids of the measured datasets.")
    shards: int = Field(default=0, ge=0)
    rows: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    targets: int = Field(default=0, ge=0)
    rejected: int = Field(default=0, ge=0, description="Source rows that were rejected.")
    media: int = Field(default=0, ge=0, description="Images of all rows; one that several rows show counts for each.")
    media_bytes: int = Field(
        default=0, ge=0, description="Bytes of the images, in rows and as files; a file counts once."
    )
    media_types: dict[str, int] = Field(default_factory=dict, description="Images by MIME type.")
    column_bytes: dict[str, int] = Field(
        description="Bytes of the shards by Parquet column, page headers included; codec streams are columns."
    )
    entropy: Histogram = Field(
        description="Per target, nats: of the kept entries and ONE bucket for the rest, -sum p ln p - tail ln tail. "
        "A lower bound of the teacher's entropy, because the distribution within the tail is not stored."
    )
    tail_mass: Histogram = Field(description="Per target: probability outside the kept ids.")
    label_rank: Histogram = Field(
        description="Per target: rank, from 1, of the label among the kept ids by probability, equal ones by id. "
        "`outside`: labels that are not kept."
    )
    label_logprob: Histogram = Field(
        description="Per target, nats: log-prob of the label, the token that follows in the text."
    )
    kept_ids: Histogram = Field(description="Per target: ids that are stored.")
    draws: Histogram = Field(description="Per target: tail draws that are stored.")
    row_tokens: Histogram = Field(description="Per row: tokens.")
    row_targets: Histogram = Field(description="Per row: targets.")
    row_media: Histogram = Field(
        default_factory=lambda: Tally(WHOLE).histogram(), description="Per row: images. Empty in earlier releases."
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.column_bytes.values())

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bytes_per_target(self) -> float | None:
        """Bytes of all shards, without the images in them, per target; None if there are no targets."""
        images = self.column_bytes["media"] if self.media else 0
        return (self.bytes - images) / self.targets if self.targets else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def label_kept(self) -> float | None:
        """Share of the targets whose label is among the kept ids; None if there are no targets."""
        return self.label_rank.count / self.targets if self.targets else None

    def __add__(self, other: Stats) -> Stats:
        """The stats of both together."""
        return Stats(
            dataset_ids=tuple(dict.fromkeys(self.dataset_ids + other.dataset_ids)),
            column_bytes={name: self.column_bytes[name] + other.column_bytes[name] for name in _COLUMNS},
            media_types=dict(sorted((Counter(self.media_types) + Counter(other.media_types)).items())),
            **{name: getattr(self, name) + getattr(other, name) for name in (*_COUNTS, *SCALES)},
        )


_COUNTS = ("shards", "rows", "tokens", "targets", "rejected", "media", "media_bytes")
OTHER_TYPES = "other"
"""In `media_types`: all types that are not read, so that a stranger's dataset cannot have any number of them."""
_COLUMNS = (*PLAIN_COLUMNS, *STREAMS, FOOTERS)


def measure_stats(root: str | Path, *, progress: bool = True) -> Stats:
    """Measure the dataset at `root`, with one row group and the bytes of its shard in memory.

    Raises what `open_dataset` raises, `ShardMissing`, `ShardDamaged`, `HeaderMismatch`, `StreamDamaged`, `InvalidRow`.
    """
    dataset = open_dataset(root)
    empty = Stats(
        dataset_ids=(dataset.dataset_id,),
        column_bytes=dict.fromkeys(_COLUMNS, 0),
        **{name: Tally(scale).histogram() for name, scale in SCALES.items()},
    )
    with tqdm(
        total=dataset.manifest.targets, unit=" targets", unit_scale=True, desc="stats", disable=not progress
    ) as bar:
        return reduce(add, _shard_stats(dataset, bar), empty)


def _shard_stats(dataset: Dataset, bar: tqdm) -> Iterator[Stats]:
    counted: set[str] = set()
    for shard in dataset.shards:
        name = shard.file.name
        data = dataset.read_file(shard.file)
        file = ShardFile(pa.BufferReader(data), size=len(data), codec=dataset.codec, where=name)
        tallies = {key: Tally(scale) for key, scale in SCALES.items()}
        found = dict.fromkeys(("rows", "tokens", "targets"), 0)
        media_bytes, media_types = 0, Counter[str]()
        for row in file.rows():
            _count(row, tallies)
            found["rows"] += 1
            found["tokens"] += row.token_ids.size
            found["targets"] += row.targets.positions
            media_bytes += _media_bytes(dataset, row, counted)
            media_types.update(item.type if item.type in ENDINGS else OTHER_TYPES for item in row.media)
            bar.update(row.targets.positions)
        for key, value in found.items():
            if value != getattr(shard, key):
                raise ShardDamaged(f"{name}: {key}", found=value, wanted=getattr(shard, key))
        yield Stats(
            dataset_ids=(dataset.dataset_id,),
            shards=1,
            **found,
            rejected=shard.rejected,
            media=media_types.total(),
            media_bytes=media_bytes,
            media_types=dict(media_types),
            column_bytes=_column_bytes(data),
            **{key: tally.histogram() for key, tally in tallies.items()},
        )


def _media_bytes(dataset: Dataset, row: CachedRow, counted: set[str]) -> int:
    """Bytes of the row's media, those of files that are not among the `counted` ones, which it adds. Raises
    `FileMissing`."""
    total = 0
    for item in row.media:
        if item.path is None or item.path not in counted:
            if (size := dataset.media_bytes(item)) is None:
                where = f"row {row.sample_id!r}: media {item.path}"
                raise FileMissing(where, found="no such file", wanted="a file that the manifest lists")
            total += size
            counted |= {item.path} if item.path is not None else set()
    return total


def _column_bytes(data: bytes) -> dict[str, int]:
    """Bytes of a shard by column, the remaining ones under `FOOTERS`. The footer must have been checked."""
    sizes = dict.fromkeys(_COLUMNS, 0)
    metadata = pq.read_metadata(pa.BufferReader(data))
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            sizes[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
    sizes[FOOTERS] = len(data) - sum(sizes.values())
    return sizes


def _count(row: CachedRow, tallies: dict[str, Tally]) -> None:
    targets, labels = row.targets, row.labels
    tallies["row_tokens"].add(np.array([row.token_ids.size]))
    tallies["row_targets"].add(np.array([targets.positions]))
    tallies["row_media"].add(np.array([len(row.media)]))
    tallies["tail_mass"].add(np.exp(targets.log_tail))
    tallies["label_logprob"].add(targets.label_logprob)
    tallies["kept_ids"].add(targets.counts)
    tallies["draws"].add(targets.draw_counts)
    block = max(1, _BLOCK_ENTRIES // targets.top_k)
    for start in range(0, targets.positions, block):
        at = slice(start, start + block)
        ids, logprobs, label = targets.ids[at], targets.logprobs[at], labels[at, None]
        tallies["entropy"].add(_entropy(logprobs, targets.log_tail[at]))
        ranks = _ranks(ids, logprobs, label, targets.label_logprob[at, None])
        tallies["label_rank"].add(ranks[ranks > 0], outside=int((ranks == 0).sum()))


def _entropy(logprobs: np.ndarray, log_tail: np.ndarray) -> np.ndarray:
    """`float32 [N]` nats: the entropy of the K entries and the tail as one more entry."""
    finite = np.maximum(logprobs, LOG_FLOOR)  # unused entries have log-prob -inf, and 0 * -inf is NaN
    return np.maximum(-np.einsum("nk,nk->n", np.exp(finite), finite) - np.exp(log_tail) * log_tail, 0)


def _ranks(ids: np.ndarray, logprobs: np.ndarray, label: np.ndarray, label_logprob: np.ndarray) -> np.ndarray:
    """`int64 [N]`: rank of the label from 1, without sorting; 0 if it is not kept."""
    before = (logprobs > label_logprob) | ((logprobs == label_logprob) & (ids < label))
    return np.where((ids == label).any(1), 1 + before.sum(1), 0)
