"""The pilot: what the teacher keeps on the source's first rows, before `dataset.json` is created.

From it comes the header's id rank table: ids that are kept often get low ranks, so that the deltas between the ids of a
position fit a byte more often. That saves a fifth of the id bytes; a table by how often ids occur in the source's own
text saves half as much (`python -m benchmarks.codec --grid-study`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.sequences import TokenSequence
from coldstill.pipeline.sources.chat import SequenceMaker
from coldstill.pipeline.sources.readers import open_source
from coldstill.pipeline.teachers.protocol import Teacher
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.rows import TeacherTargets, span_positions
from coldstill.storage_schema.store import Store

_MOST_LISTED = 4096
"""The header stands in every shard. The whole table would save as much."""
_LEAST_COUNT = 2


def rank_ids(config: CaptureConfig, teacher: Teacher, header: DatasetHeader, unit: Unit) -> tuple[int, ...]:
    """Ids from the most frequent on, at most 4,096, as kept and drawn at the first `config.pilot_targets` targets of a
    unit; ties by id. Raises the named errors of sources and teachers."""
    made = SequenceMaker.of(config).sequences(open_source(config.source, Store(config.output)).read(unit))
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
        if targets >= config.pilot_targets:
            break
    return (scored.targets for scored in teacher.score(chosen)) if chosen else ()


def _answered(config: CaptureConfig, teacher: Teacher, prompts: Iterator[TokenSequence]) -> Iterator[TeacherTargets]:
    """Answers to the first prompts: at each call so many prompts as would give the wanted targets if all their answers
    were as long as they may be."""
    wanted = config.pilot_targets
    most = config.sampling.n * min(config.sampling.max_tokens, config.teacher.max_length)
    while wanted > 0 and (chosen := list(islice(prompts, -(-wanted // most)))):
        for answer in teacher.score(chosen):
            wanted -= answer.targets.positions
            yield answer.targets
