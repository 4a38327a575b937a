"""The calibration pass: which token ids the teacher keeps often, and how flat it is.

The first worker scores the first targets of the source before `dataset.json` is created. Frequent ids get low ranks, so
that the differences between the ids of a position fit into one byte more often. That saves a fifth of the id bytes; a
table of how often ids occur in the source's text would save half as much (`python -m benchmarks.codec --grid-study`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from coldstill.storage_schema.store.retrying import RetryingStore

from .config import CaptureConfig, TeacherConfig
from .sources.sequence_maker import SequenceMaker
from .sources.source import open_source
from .teachers.protocol import Teacher, TokenSequence, scored_of

_MOST_LISTED = 4096
"""The header is part of every shard, so the table is short. A table of the whole vocabulary would not save more."""
_LEAST_COUNT = 2

FLAT_TAIL_MASS = 0.05
"""Mean tail mass above which a capture without draws loses most of what the teacher adds (`losses/base.py`)."""

log = logging.getLogger(__name__)


class Calibration(NamedTuple):
    """What the first targets show of the teacher."""

    id_ranks: tuple[int, ...]
    """The most frequent ids among those kept and drawn: at most 4,096, by descending frequency, then by id."""
    tail_mass: float
    """Mean probability outside the kept ids; 0 without targets."""


def calibrate(config: CaptureConfig, teacher: Teacher, header: DatasetHeader, unit: Unit) -> Calibration:
    """Score the first `config.calibration_targets` targets of a unit.

    Raises the named errors of sources and teachers.
    """
    maker = SequenceMaker.of(config, header=header)
    store = RetryingStore(config.output, retry_for_s=config.cluster.store_retry_s)
    made = maker.sequences(open_source(config.source, store).read(unit))
    sequences = (sequence for sequence in made if isinstance(sequence, TokenSequence))
    counts = np.zeros(header.token_count, np.int64)
    positions, tail_mass = 0, 0.0
    for targets in (_answered if config.mode == "generate" else _scored)(config, teacher, sequences):
        counts += np.bincount(targets.ids[targets.kept], minlength=counts.size)
        counts += np.bincount(targets.draw_ids, minlength=counts.size)
        positions += targets.positions
        tail_mass += float(np.exp(targets.log_tail.astype(np.float64)).sum())
    listed = np.flatnonzero(counts >= _LEAST_COUNT)
    order = np.argsort(-counts[listed], kind="stable")[:_MOST_LISTED]
    return Calibration(tuple(listed[order].tolist()), tail_mass / max(1, positions))


def warn_if_flat(teacher: TeacherConfig, tail_mass: float) -> None:
    """Log a warning if a capture without draws would miss much of the teacher's distributions."""
    if teacher.draws or tail_mass <= FLAT_TAIL_MASS:
        return
    way = "set teacher.draws: 64" if teacher.can_draw else "use tap worker or engine transformers, which can draw"
    log.warning(
        "%.3f of the teacher's mass on average is outside its top %d, and without draws the dataset does not hold the "
        "shape of that part: %s, or raise teacher.top_k, with another output",
        tail_mass,
        teacher.top_k,
        way,
    )


def _scored(config: CaptureConfig, teacher: Teacher, sequences: Iterable[TokenSequence]) -> Iterable[TeacherTargets]:
    """The first sequences, scored in one call."""
    chosen: list[TokenSequence] = []
    targets = 0
    for sequence in sequences:
        chosen.append(sequence)
        targets += span_positions(sequence.target_spans).size
        if targets >= config.calibration_targets:
            break
    return (scored.targets for scored in scored_of(teacher.score(chosen))) if chosen else ()


def _answered(config: CaptureConfig, teacher: Teacher, prompts: Iterator[TokenSequence]) -> Iterator[TeacherTargets]:
    """Answers to the first prompts.

    Each call takes as many prompts as would give the missing targets if all answers had the maximum length.
    """
    wanted = config.calibration_targets
    most = config.sampling.n * min(config.sampling.max_tokens, config.teacher.max_length)
    while wanted > 0 and (chosen := list(islice(prompts, -(-wanted // most)))):
        for answer in scored_of(teacher.score(chosen)):
            wanted -= answer.targets.positions
            yield answer.targets
