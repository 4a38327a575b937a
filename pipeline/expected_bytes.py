"""Bytes that a target takes in a shard, before a teacher has run: those of the codec's benchmark, and a bound."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coldstill.storage_schema.codec import most_position_bytes
from coldstill.storage_schema.header import MAX_VOCAB_SIZE, Codec

from .config import CaptureConfig
from .source_config import SourceConfig

# Bytes per target until a teacher has run: `benchmarks/results/codec_2_cores.json`, sides "ours", of a sharp and
# a flat teacher (mean entropies 1.2 and 4.4 nats, vocabulary 8,192). A vocabulary of more than 65,536 ids takes a few
# bytes more. Between the measured K the values are interpolated linearly.
TOP_KS = (16, 32, 64, 128)
FLOOR = 1e-4
DRAWS = 64
BYTES_PER_TARGET = {
    ("fine", False, "sharp"): (30.8, 54.5, 98.6, 182.1),
    ("fine", False, "flat"): (30.1, 54.3, 102.1, 193.4),
    ("fine", True, "sharp"): (25.6, 38.8, 57.1, 76.8),
    ("fine", True, "flat"): (30.0, 53.2, 97.3, 176.3),
    ("coarse", False, "sharp"): (27.7, 50.2, 90.8, 169.7),
    ("coarse", False, "flat"): (26.7, 48.7, 90.3, 171.5),
    ("coarse", True, "sharp"): (22.5, 34.8, 51.0, 68.5),
    ("coarse", True, "flat"): (26.6, 47.6, 86.0, 155.8),
    ("exact", False, "sharp"): (47.6, 91.7, 179.6, 357.1),
    ("exact", False, "flat"): (45.9, 89.2, 176.7, 352.8),
}
"""By fidelity, whether min_prob excludes ids below `FLOOR`, and sharpness: bytes at each of `TOP_KS`, without draws."""
BYTES_OF_DRAWS = {
    ("iid", "sharp"): dict(zip(TOP_KS, (4.5, 3.0, 1.9, 1.1), strict=True)),
    ("iid", "flat"): dict(zip(TOP_KS, (30.6, 29.2, 27.3, 24.7), strict=True)),
    ("systematic", "sharp"): {4: 9.5, 8: 7.0, 16: 4.8, 32: 3.3, 64: 2.1, 128: 1.4},
    ("systematic", "flat"): {4: 47.3, 8: 44.1, 16: 40.5, 32: 36.6, 64: 32.7, 128: 28.5},
}
"""Bytes per target that `DRAWS` draws add, by K; of iid ones at most 32 are kept. The systematic ones are those of
`benchmarks/results/draws_bytes_2_cores.json`."""
BYTES_BESIDE_IDS = 2.0
"""Least bytes of a target beside its ids: its tail, label and counts. Estimates below the least measured K use it."""
RANKED = 0.92
"""Factor by which an id rank table changes the bytes."""
BYTES_PER_TOKEN = 1.5
"""Bytes per token of an answer that the teacher has not generated yet."""
BYTES_PER_SHARD = 5_000
"""Parquet's footer and page headers, and the header of the dataset, in each shard."""
MOST_BYTES_PER_GROUP = 4_000
"""Footer and page headers of a row group, at most."""
MOST_BYTES_PER_ROW = 256
"""Lengths and levels of a row's columns, at most, beside what the codec puts around its streams."""
BYTES_OF_RANKS = 28_000
"""The id rank table of a large vocabulary, at most; it is part of each shard's header."""


class Expected(NamedTuple):
    """Bytes per target of a sharp and of a flat teacher, the smaller one first. Others may take less or more."""

    least: float
    most: float


def bytes_per_target(config: CaptureConfig) -> Expected:
    """Bytes of the teacher's distribution at a target."""
    return Expected(*sorted(_bytes(config, sharpness) for sharpness in ("sharp", "flat")))


def _bytes(config: CaptureConfig, sharpness: str) -> float:
    teacher = config.teacher
    has_floor = teacher.min_prob >= FLOOR and config.fidelity != "exact"
    entries = _at(
        BYTES_PER_TARGET[config.fidelity, has_floor, sharpness], config.kept_width(token_count=MAX_VOCAB_SIZE)
    )
    of_draws = BYTES_OF_DRAWS[teacher.draw_method, sharpness]
    draws = float(np.interp(teacher.top_k, list(of_draws), list(of_draws.values())))
    draws *= min(teacher.draws, 2 * teacher.kept_draws) / DRAWS
    logprobs = 2 * draws if teacher.draw_logprobs else 0.0
    return (RANKED if config.calibration_targets and config.fidelity != "exact" else 1.0) * entries + draws + logprobs


def most_bytes_per_target(config: CaptureConfig, *, token_count: int = MAX_VOCAB_SIZE) -> float:
    """Bytes of the teacher's distribution at a target, if it cannot be compressed."""
    teacher = config.teacher
    width = config.kept_width(token_count=token_count)
    return most_position_bytes(
        codec=Codec.preset(config.fidelity, top_k=width).name,
        top_k=width,
        token_count=token_count,
        kept_draws=min(teacher.draws, teacher.kept_draws),
        draw_logprobs=teacher.draw_logprobs,
    )


def fix_of_large_shards(source: SourceConfig) -> str:
    """How a capture gets smaller shards."""
    if source.rows_of is not None:
        return (
            "lower teacher.top_k, teacher.kept_draws or source.images_in_row_bytes, and choose another output: a unit "
            "is a shard of source.rows_of, so that rows_per_unit has no effect"
        )
    return "lower rows_per_unit, teacher.max_length or source.images_in_row_bytes, and choose another output"


def _at(values: tuple[float, ...], top_k: int) -> float:
    """Linear interpolation between the measured K and a position without ids; proportional to K above them."""
    if top_k > TOP_KS[-1]:
        return values[-1] * top_k / TOP_KS[-1]
    return float(np.interp(top_k, (0, *TOP_KS), (BYTES_BESIDE_IDS, *values)))
