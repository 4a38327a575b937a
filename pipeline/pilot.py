"""The pilot: what the teacher keeps on the source's first rows, before `dataset.json` is created.

From it comes the header's id rank table: ids that are kept often get low ranks, so that the deltas between the ids of a
position fit a byte more often. That saves a fifth of the id bytes; a table by how often ids occur in the source's own
text saves half as much (`python -m benchmarks.codec --grid-study`).
"""

from __future__ import annotations

import numpy as np

from storage_schema.header import DatasetHeader
from storage_schema.plan import Unit
from storage_schema.rows import span_positions

from .config import CaptureConfig
from .prepare import load_tokenizer
from .sequences import TokenSequence
from .sources.chat import SequenceMaker
from .sources.readers import open_source
from .teachers.protocol import Teacher

_MOST_LISTED = 4096
"""The header stands in every shard. The whole table would save as much."""
_LEAST_COUNT = 2


def rank_ids(config: CaptureConfig, teacher: Teacher, header: DatasetHeader, unit: Unit) -> tuple[int, ...]:
    """Ids from the most frequent on, at most 4,096, as kept and drawn at the first `config.pilot_targets` targets of a
    unit; ties by id. Raises the named errors of sources and teachers."""
    counts = np.zeros(header.token_count, np.int64)
    for targets in teacher.score(_first_sequences(config, unit)):
        counts += np.bincount(targets.ids[targets.kept], minlength=counts.size)
        counts += np.bincount(targets.draw_ids, minlength=counts.size)
    listed = np.flatnonzero(counts >= _LEAST_COUNT)
    order = np.argsort(-counts[listed], kind="stable")[:_MOST_LISTED]
    return tuple(listed[order].tolist())


def _first_sequences(config: CaptureConfig, unit: Unit) -> list[TokenSequence]:
    maker = SequenceMaker(load_tokenizer(config.teacher), source=config.source, max_length=config.teacher.max_length)
    sequences: list[TokenSequence] = []
    targets = 0
    for row in open_source(config.source.path).read(unit):
        made = maker.make(row)
        if isinstance(made, TokenSequence):
            sequences.append(made)
            targets += span_positions(made.target_spans).size
        if targets >= config.pilot_targets:
            break
    return sequences
