"""Estimate a capture without running it: rows, tokens, bytes, hours and cost. Nothing is written to its output.

Rows, tokens and targets are counted by reading the whole source once. Bytes are those of the codec's benchmark; with a
probe, one worker scores the first rows of the source for a minute, which gives bytes, speed and cost.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, computed_field

from coldstill.common.progress import tqdm
from coldstill.storage_schema.codec import MOST_ROW_OVERHEAD
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.rows import span_positions
from coldstill.storage_schema.shard.layout import MAX_GROUP_BYTES, MAX_GROUP_ROWS, MAX_SHARD_BYTES
from coldstill.storage_schema.store import Store

from .config import CaptureConfig
from .errors import all_rejected
from .expected_bytes import (
    BYTES_OF_RANKS,
    BYTES_PER_SHARD,
    BYTES_PER_TOKEN,
    MOST_BYTES_PER_GROUP,
    MOST_BYTES_PER_ROW,
    bytes_per_target,
    fix_of_large_shards,
    most_bytes_per_target,
)
from .image_counts import ImageCounts, ImageEstimate
from .prepare import make_header, open_checked, read_teacher, require_unique_ids
from .sources.sequence_maker import SequenceMaker
from .sources.source import Source
from .teachers.checkpoint import with_read_length
from .teachers.protocol import TokenSequence
from .worker import SpeedReport

PROBE_S = 60.0
_PROBED_TOKENS = 1 << 20
_PROBED_SEQUENCES = 4096
_PROBED_MEDIA_BYTES = 256 << 20
"""Upper limits of what is sent to the worker of a probe: more than it scores in a minute, little for the network."""

log = logging.getLogger(__name__)


@dataclass
class SourceCounts:
    """`rows` of the source, `rejected` by reason, and `sequences` for the teacher with their `tokens` and `targets`.

    In mode generate the sequences are prompts, and the targets are the maximum that their answers may have.
    """

    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first reject of each reason: its row and its detail."""
    layouts: tuple[str, ...] = ()
    own_bytes: int = 0
    """Compressed bytes of what the source gives to the rows: tokens, ids and metadata."""
    own_bytes_most: int = 0
    """The same before compression."""
    sequences: int = 0
    tokens: int = 0
    targets: int = 0
    images: ImageEstimate | None = None
    """Of a teacher that sees images."""


class Effort(BaseModel):
    """Time and cost of the capture, from the speed of one worker in a probe."""

    model_config = ConfigDict(frozen=True)

    tokens_per_s: float = Field(description="Tokens per second of one worker, without the engine's start.")
    workers: int = Field(description="cluster.max_workers.")
    hours: float = Field(description="Hours with that many workers all the time.")
    worker_hours: float
    gpu_hours: float
    cost: float | None = Field(description="The cost, if cluster.price_per_gpu_hour is set.")


class DryRun(BaseModel):
    """The estimate of a whole capture."""

    model_config = ConfigDict(frozen=True)

    rows: int
    rejected: dict[str, int] = Field(
        description="Rejects by reason; a row that is split may be counted more than once."
    )
    reject_examples: dict[str, str] = Field(default={}, description="The first reject of each reason.")
    sequences: int
    tokens: int = Field(description="Tokens of the source as the teacher reads them; in mode generate, of the prompts.")
    targets: int
    targets_are: Literal["counted", "at most", "by the probe's answers"]
    read_as: tuple[str, ...] = Field(default=(), description="How columns of recognized layouts were read.")
    shards: int
    bytes_from: int
    bytes_to: int = Field(description="Expected bytes of the shards, from and to; a teacher may be sharper or flatter.")
    bytes_most: int = Field(description="No capture takes more bytes: as if no distribution could be compressed.")
    bytes_are: Literal["of a sharp and a flat teacher", "by the probe's shard"]
    images: ImageEstimate | None = Field(default=None, description="Images, for a teacher that sees them.")
    effort: Effort | None = None

    # mypy knows no decorated property, as pydantic's documentation of `computed_field` says.
    @computed_field(  # type: ignore[prop-decorator]
        description="bytes_from per million targets, by which captures of different sizes compare."
    )
    @property
    def bytes_per_million_targets_from(self) -> int:
        """Bytes of the shards per million targets, of the smaller estimate."""
        return self._per_million(self.bytes_from)

    @computed_field(description="bytes_to per million targets.")  # type: ignore[prop-decorator]
    @property
    def bytes_per_million_targets_to(self) -> int:
        """Bytes of the shards per million targets, of the larger estimate."""
        return self._per_million(self.bytes_to)

    def _per_million(self, size: int) -> int:
        return round(size * 1_000_000 / max(1, self.targets))

    def lines(self) -> dict[str, object]:
        """All known values, flat, for printing."""
        known = self.model_dump(exclude={"effort", "images", "rejected", "reject_examples", "read_as"})
        layouts = {"read as": "; ".join(self.read_as)} if self.read_as else {}
        effort = self.effort.model_dump(exclude_none=True) if self.effort else {}
        rejects: dict[str, object] = {}
        for reason, count in self.rejected.items():
            rejects[f"rejected: {reason}"] = count
            if reason in self.reject_examples:
                rejects[f"such as: {reason}"] = self.reject_examples[reason]
        images = self.images.model_dump(exclude_none=True) if self.images else {}
        return {**layouts, **known, **images, **rejects, **effort}


def dry_run(config: CaptureConfig, *, probe: bool = False, probe_s: float = PROBE_S, progress: bool = True) -> DryRun:
    """Count the source, and with `probe` measure one worker for `probe_s` seconds.

    Raises `UnsupportedStore` for an output that the capture could not write, and the named errors of the
    configuration, source and teacher.
    """
    Store(config.output).require_usable()
    config = with_read_length(config)
    source, maker = open_checked(config)  # without a store: nothing is staged
    _, facts, model_config = read_teacher(config, maker)  # the capture would refuse the same settings
    units = source.plan(config.rows_per_unit)
    require_unique_ids(config, source)
    counts = count_source(config, units=units, source=source, maker=maker, progress=progress)
    if not counts.sequences:
        raise all_rejected(
            counts.rejected,
            what=f"{source.name}: all {counts.rows:,} rows",
            example=next(iter(counts.examples.values()), ""),
        )
    shards = len(units)
    most = _most_bytes(config, counts, shards, token_count=facts.token_count)
    if probe:
        header = make_header(
            config, model_config=model_config, facts=facts, maker=maker, source_sha256=source.fingerprint
        )
        report, gpus = _probe(config, source, maker, header, seconds=probe_s)
        found = _with_probe(config, counts, shards=shards, bytes_most=most, report=report, gpus=gpus)
    else:
        found = _without_probe(config, counts, shards=shards, bytes_most=most)
    _warn_if_too_large(config, found)
    return found


def _warn_if_too_large(config: CaptureConfig, found: DryRun) -> None:
    """Log a warning if a shard of the mean size is too large: the capture would end at its first unit."""
    mean = found.bytes_to // found.shards
    if mean > MAX_SHARD_BYTES:
        log.warning(
            "a shard would have up to %s bytes on average, and a shard has at most %s: %s",
            f"{mean:,}",
            f"{MAX_SHARD_BYTES:,}",
            fix_of_large_shards(config.source),
        )


def _without_probe(config: CaptureConfig, counts: SourceCounts, *, shards: int, bytes_most: int) -> DryRun:
    targets, own = counts.targets, counts.own_bytes + shards * BYTES_PER_SHARD
    if config.mode == "generate":
        own += counts.own_bytes * (config.sampling.n - 1) + round(targets * BYTES_PER_TOKEN)
    least, most = (round(targets * one) + own for one in bytes_per_target(config))
    if config.calibration_targets and config.fidelity != "exact":
        most += shards * BYTES_OF_RANKS
    return DryRun(
        **_counted(counts),
        targets=targets,
        targets_are="at most" if config.mode == "generate" else "counted",
        shards=shards,
        bytes_from=least,
        bytes_to=most,
        bytes_most=bytes_most,
        bytes_are="of a sharp and a flat teacher",
    )


def _with_probe(
    config: CaptureConfig, counts: SourceCounts, *, shards: int, bytes_most: int, report: SpeedReport, gpus: float
) -> DryRun:
    """Extrapolated from the probe: answers have its length, and scoring takes time in proportion to tokens."""
    answers = config.mode == "generate"
    share = counts.sequences / report.sequences if answers else counts.tokens / max(1, report.tokens)
    targets = round(report.targets * share) if answers else counts.targets
    size = round(report.bytes * (targets / max(1, report.targets)))
    if counts.images:
        size += counts.images.image_bytes_in_rows * (config.sampling.n if answers else 1)
    worker_hours = report.seconds * share / 3600
    price, workers = config.cluster.price_per_gpu_hour, config.cluster.max_workers
    return DryRun(
        **_counted(counts),
        targets=targets,
        targets_are="by the probe's answers" if answers else "counted",
        shards=shards,
        bytes_from=size,
        bytes_to=size,
        bytes_most=bytes_most,
        bytes_are="by the probe's shard",
        effort=Effort(
            tokens_per_s=report.tokens / max(report.seconds, 1e-9),
            workers=workers,
            hours=worker_hours / min(workers, shards),
            worker_hours=worker_hours,
            gpu_hours=worker_hours * gpus,
            cost=None if price is None else worker_hours * gpus * price,
        ),
    )


def _counted(counts: SourceCounts) -> dict[str, object]:
    return {
        "rows": counts.rows,
        "rejected": dict(counts.rejected.most_common()),
        "reject_examples": counts.examples,
        "read_as": counts.layouts,
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "images": counts.images,
    }


def _probe(
    config: CaptureConfig, source: Source, maker: SequenceMaker, header: DatasetHeader, *, seconds: float
) -> tuple[SpeedReport, float]:
    """The speed of one real worker, and its number of GPUs."""
    from .cluster.pool import WorkerPool

    sequences = list(_first(source, maker))
    with (
        # A worker that dies writes a crash report to its output; the capture's own output must not be touched.
        tempfile.TemporaryDirectory(prefix="coldstill-") as elsewhere,
        WorkerPool(config.model_copy(update={"output": elsewhere})) as pool,
    ):
        return pool.measure(header, sequences, seconds=seconds), pool.gpus_per_worker


def _first(source: Source, maker: SequenceMaker) -> Iterator[TokenSequence]:
    tokens = sequences = media_bytes = 0
    for made in maker.sequences(source.rows()):
        if isinstance(made, TokenSequence):
            yield made
            media_bytes += sum(len(item.data or b"") for item in made.media)
            tokens += made.token_ids.size + span_positions(made.target_spans).size
            sequences += 1
        if tokens >= _PROBED_TOKENS or sequences >= _PROBED_SEQUENCES or media_bytes >= _PROBED_MEDIA_BYTES:
            return


def count_source(
    config: CaptureConfig, *, units: Sequence[Unit], source: Source, maker: SequenceMaker, progress: bool = True
) -> SourceCounts:
    """Counts over these units, read in order. Raises the named errors of sources and templates."""
    counts = SourceCounts()
    images = ImageCounts(maker.processor, config) if maker.processor else None
    planned = sum(unit.rows for unit in units)
    with tqdm(total=planned, desc="counting", unit=" rows", smoothing=0, disable=not progress) as bar:
        for unit in units:
            tokens, columns = [], []
            for made in maker.sequences(source.read(unit)):
                if isinstance(made, Reject):
                    counts.rejected[str(made.reason)] += 1
                    counts.examples.setdefault(str(made.reason), f"row {made.source_row}: {made.detail}")
                    continue
                counts.sequences += 1
                counts.tokens += made.token_ids.size
                counts.targets += _targets(config, made)
                if images:
                    images.add(made)
                tokens.append(made.as_stored.token_ids)
                columns.append(f"{made.sample_id} {json.dumps(made.metadata, ensure_ascii=False)}")
            counts.own_bytes += _compressed(b"".join(ids.tobytes() for ids in tokens))
            counts.own_bytes += _compressed("\n".join(columns).encode())
            counts.own_bytes_most += sum(8 * ids.size for ids in tokens) + sum(len(text.encode()) for text in columns)
            counts.rows += unit.rows
            bar.update(unit.rows)
            bar.set_postfix_str(f"{counts.tokens:,} tokens, {counts.rejected.total():,} rejected")
    counts.layouts = maker.layouts
    if images:
        counts.images = images.estimate()
        counts.own_bytes += images.bytes_in_rows
        counts.own_bytes_most += images.bytes_in_rows
    return counts


def _compressed(data: bytes) -> int:
    return len(pa.compress(data, codec="zstd", asbytes=True))


def _targets(config: CaptureConfig, sequence: TokenSequence) -> int:
    if config.mode != "generate":
        return int(span_positions(sequence.target_spans).size)
    room = config.teacher.max_length - sequence.as_stored.token_ids.size
    room = min(room, config.teacher.read_length - sequence.token_ids.size)
    return config.sampling.n * min(config.sampling.max_tokens, room)


def _most_bytes(config: CaptureConfig, counts: SourceCounts, shards: int, *, token_count: int) -> int:
    """No capture takes more. Answers have all tokens that they may have."""
    rows, own, targets = counts.sequences, counts.own_bytes_most, counts.targets
    if config.mode == "generate":
        rows, own = rows * config.sampling.n, own * config.sampling.n + 8 * targets
    total = own + round(targets * most_bytes_per_target(config, token_count=token_count))
    total += rows * (MOST_ROW_OVERHEAD + MOST_BYTES_PER_ROW)
    groups = shards + 2 * total // MAX_GROUP_BYTES + rows // MAX_GROUP_ROWS
    ranks = BYTES_OF_RANKS if config.calibration_targets and config.fidelity != "exact" else 0
    return total + groups * MOST_BYTES_PER_GROUP + shards * (BYTES_PER_SHARD + ranks)
