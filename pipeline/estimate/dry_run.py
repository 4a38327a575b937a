"""What a capture would be: settings in, rows, tokens, bytes, hours and money out. Nothing is written to its output.

Rows are counted by reading the whole source once. Speed is only known from the teacher itself: with a probe one worker
scores the source's first rows for a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from coldstill.pipeline.cluster.speed import SpeedReport
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.preparation.header import load_model_config, make_header
from coldstill.pipeline.sequences import TokenSequence
from coldstill.pipeline.sources.chat import SequenceMaker
from coldstill.pipeline.sources.counting import SourceCounts, count_source
from coldstill.pipeline.sources.readers import Source, open_source
from coldstill.pipeline.tokenizer import files_of
from coldstill.storage_schema.rows import span_positions
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, fingerprint_bytes

from .expected_bytes import BYTES_PER_TOKEN, bytes_per_target

PROBE_S = 60.0
_CHECKED_ROWS = 32
_PROBED_TOKENS = 1 << 20
_PROBED_SEQUENCES = 4096
"""What is sent to the worker of a probe: more than it can score in its minute, little for the network."""


class Effort(BaseModel):
    """What the capture would take, by the speed of one worker in a probe."""

    model_config = ConfigDict(frozen=True)

    tokens_per_s: float = Field(description="Of one worker, without its engine's start.")
    workers: int = Field(description="cluster.max_workers.")
    hours: float = Field(description="With so many workers all the time.")
    worker_hours: float
    gpu_hours: float
    cost: float | None = Field(description="Where a price is set.")


class DryRun(BaseModel):
    """A capture that was not run."""

    model_config = ConfigDict(frozen=True)

    rows: int
    rejected: dict[str, int] = Field(description="By reason; a row that is split may be counted more than once.")
    sequences: int
    tokens: int = Field(description="Of the source: in mode generate those of the prompts.")
    targets: int
    targets_are: Literal["counted", "at most", "by the probe's answers"]
    shards: int
    bytes_least: int
    bytes_most: int = Field(description="Of the shards, without metadata columns.")
    bytes_are: Literal["of a sharp and a flat teacher", "by the probe's shard"]
    effort: Effort | None = None

    def lines(self) -> dict[str, object]:
        """Everything that is known, flat."""
        known = self.model_dump(exclude={"effort", "rejected"})
        effort = self.effort.model_dump(exclude_none=True) if self.effort else {}
        rejects = {f"rejected: {reason}": count for reason, count in self.rejected.items()}
        return {**known, **rejects, **effort}


def dry_run(config: CaptureConfig, *, probe: bool = False, probe_s: float = PROBE_S, progress: bool = True) -> DryRun:
    """Count, and with `probe` measure one worker. Raises the named errors of the configuration, source and teacher."""
    source = open_source(config.source)  # without a store: nothing is staged
    maker = SequenceMaker.of(config)
    maker.check(source.head(_CHECKED_ROWS))
    units = source.plan(config.rows_per_unit)
    counts = count_source(config, units=units, source=source, maker=maker, progress=progress)
    if probe and counts.sequences:
        report, gpus = _probe(config, source, maker, seconds=probe_s)
        return _with_probe(config, counts, shards=len(units), report=report, gpus=gpus)
    return _without_probe(config, counts, shards=len(units))


def _without_probe(config: CaptureConfig, counts: SourceCounts, *, shards: int) -> DryRun:
    targets, tokens = counts.targets, counts.tokens
    if config.mode == "generate":
        targets = counts.sequences * config.sampling.n * config.sampling.max_tokens
        tokens = counts.tokens * config.sampling.n + targets
    each = bytes_per_target(config)
    least, most = (round(targets * one + tokens * BYTES_PER_TOKEN) for one in each)
    return DryRun(
        **_counted(counts),
        targets=targets,
        targets_are="at most" if config.mode == "generate" else "counted",
        shards=shards,
        bytes_least=least,
        bytes_most=most,
        bytes_are="of a sharp and a flat teacher",
    )


def _with_probe(
    config: CaptureConfig, counts: SourceCounts, *, shards: int, report: SpeedReport, gpus: float
) -> DryRun:
    """Answers are as long as those of the probe; what is scored takes as long as its tokens."""
    answers = config.mode == "generate"
    share = counts.sequences / report.sequences if answers else counts.tokens / max(1, report.tokens)
    targets = round(report.targets * share) if answers else counts.targets
    size = round(report.bytes * (targets / max(1, report.targets)))
    worker_hours = report.seconds * share / 3600
    price, workers = config.cluster.price_per_gpu_hour, config.cluster.max_workers
    return DryRun(
        **_counted(counts),
        targets=targets,
        targets_are="by the probe's answers" if answers else "counted",
        shards=shards,
        bytes_least=size,
        bytes_most=size,
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
        "sequences": counts.sequences,
        "tokens": counts.tokens,
    }


def _probe(config: CaptureConfig, source: Source, maker: SequenceMaker, *, seconds: float) -> tuple[SpeedReport, float]:
    """What one real worker does, and the GPUs that it holds."""
    from coldstill.pipeline.cluster.pool import WorkerPool

    facts = fingerprint_bytes(files_of(maker.tokenizer)[TOKENIZER_FILE], where=f"{config.teacher.model}: tokenizer")
    header = make_header(
        config,
        model_config=load_model_config(config.teacher, facts),
        facts=facts,
        maker=maker,
        source_sha256=source.fingerprint,
    )
    sequences = list(_first(source, maker))
    with (
        # Workers write crash reports to their output: not to the dataset, which a dry run must not touch.
        tempfile.TemporaryDirectory(prefix="coldstill-") as elsewhere,
        WorkerPool(config.model_copy(update={"output": elsewhere})) as pool,
    ):
        return pool.measure(header, sequences, seconds=seconds), pool.gpus_per_worker


def _first(source: Source, maker: SequenceMaker) -> Iterator[TokenSequence]:
    tokens = sequences = 0
    for made in maker.sequences(source.rows()):
        if isinstance(made, TokenSequence):
            yield made
            tokens += made.token_ids.size + span_positions(made.target_spans).size
            sequences += 1
        if tokens >= _PROBED_TOKENS or sequences >= _PROBED_SEQUENCES:
            return
