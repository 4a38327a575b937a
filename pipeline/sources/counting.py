"""What a capture would do, without a teacher: the rows, tokens and targets of a source, for `--dry-run`.

Settings, plan, source and sequence maker in; counts out. One unit is read at a time, and of it one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.sequences import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.plan import Unit
from coldstill.storage_schema.rows import span_positions

from .chat import SequenceMaker
from .readers import Source


@dataclass
class SourceCounts:
    """`rows` of the source, `rejected` by reason; `sequences` that the teacher would see, with their `tokens` and
    `targets`. In mode generate the sequences are prompts, and the targets are the most that the answers may have."""

    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    sequences: int = 0
    tokens: int = 0
    targets: int = 0


def count_source(
    config: CaptureConfig, *, units: Sequence[Unit], source: Source, maker: SequenceMaker, progress: bool = True
) -> SourceCounts:
    """Counts over these units, read one after the other. Raises the named errors of sources and templates."""
    counts = SourceCounts()
    planned = sum(unit.rows for unit in units)
    with tqdm(total=planned, desc="counting", unit=" rows", smoothing=0, disable=not progress) as bar:
        for unit in units:
            for made in maker.sequences(source.read(unit)):
                if isinstance(made, Reject):
                    counts.rejected[made.reason] += 1
                    continue
                counts.sequences += 1
                counts.tokens += made.token_ids.size
                counts.targets += _targets(config, made)
            counts.rows += unit.rows
            bar.update(unit.rows)
            bar.set_postfix_str(f"{counts.tokens:,} tokens, {counts.rejected.total():,} rejected")
    return counts


def _targets(config: CaptureConfig, sequence: TokenSequence) -> int:
    if config.mode != "generate":
        return int(span_positions(sequence.target_spans).size)
    room = config.teacher.max_length - sequence.token_ids.size
    return config.sampling.n * min(config.sampling.max_tokens, room)
