"""What goes to a teacher and what comes back: token sequences, and token sequences with the teacher's word.

Shape letters: `T` tokens, `n` spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from coldstill.storage_schema.rows import CachedRow, TeacherTargets


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """What a teacher is asked about: `token_ids int32 [T]`, and its distributions at the positions of
    `target_spans int32 [n, 2]`; no spans for a prompt that it is to answer. `source_row` is the row of the source that
    it was made from (the first, where documents are joined)."""

    sample_id: str
    source_row: int
    token_ids: np.ndarray
    target_spans: np.ndarray
    metadata: Mapping[str, Any] = field(default_factory=dict)


class ScoredSequence(NamedTuple):
    """A sequence and the teacher's distributions at its target positions."""

    sequence: TokenSequence
    targets: TeacherTargets

    @property
    def row(self) -> CachedRow:
        """The row of a dataset that it becomes."""
        return CachedRow(
            sample_id=self.sequence.sample_id,
            token_ids=self.sequence.token_ids,
            target_spans=self.sequence.target_spans,
            targets=self.targets,
            metadata=self.sequence.metadata,
        )
