"""The calibration pass: which token ids the teacher keeps often, for the header's id rank table.

The first worker scores the first targets of the source before `dataset.json` is created. Frequent ids get low ranks, so
that the differences between the ids of a position fit into one byte more often. That saves a fifth of the id bytes; a
table of how often ids occur in the source's text would save half as much (`python -m benchmarks.codec --grid-study`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from coldstill.storage_schema.store import Store

from .config import CaptureConfig
from .sources.sequence_maker import SequenceMaker, template_date_of
from .sources.source import open_source
from .teachers.protocol import Teacher, TokenSequence

_MOST_LISTED = 4096
"""The header is part of every shard, so the table is short. A table of the whole vocabulary would not save more."""
_LEAST_COUNT = 2


def rank_ids(config: CaptureConfig, teacher: Teacher, header: DatasetHeader, unit: Unit) -> tuple[int, ...]:
    """The most frequent ids among those kept and drawn at the first `config.calibration_targets` targets of a unit.

    At most 4,096, in descending order of frequency, then by id. Raises the named errors of sources and teachers.
    """
    maker = SequenceMaker.of(config, today=template_date_of(header))
    made = maker.sequences(open_source(config.source, Store(config.output)).read(unit))
    sequences = (sequence for sequence in made if isinstance(sequence, TokenSequence))
    counts = np.zeros(header.token_count, np.int64)
    for targets in (_answered if config.mode == "generate" else _scored)(config, teacher, sequences):
        counts += np.bincount(targets.ids[targets.kept], minlength=counts.size)
        counts += np.bincount(targets.draw_ids, minlength=counts.size)
    listed = np.flatnonzero(counts >= _LEAST_COUNT)
    order = np.argsort(-counts[listed], kind="stable")[:_MOST_LISTED]
    return tuple(listed[order].tolist())


def _scored(config: CaptureConfig, teacher: Teacher, sequences: Iterable[TokenSequence]) -> Iterable[TeacherTargets]:
    """The first sequences, scored in one call."""
    chosen: list[TokenSequence] = []
    targets = 0
    for sequence in sequences:
        chosen.append(sequence)
        targets += span_positions(sequence.target_spans).size
        if targets >= config.calibration_targets:
            break
    return (scored.targets for scored in teacher.score(chosen)) if chosen else ()


def _answered(config: CaptureConfig, teacher: Teacher, prompts: Iterator[TokenSequence]) -> Iterator[TeacherTargets]:
    """Answers to the first prompts.

    Each call takes as many prompts as would give the missing targets if all answers had the maximum length.
    """
    wanted = config.calibration_targets
    most = config.sampling.n * min(config.sampling.max_tokens, config.teacher.max_length)
    while wanted > 0 and (chosen := list(islice(prompts, -(-wanted // most)))):
        for answer in teacher.score(chosen):
            wanted -= answer.targets.positions
            yield answer.targets
