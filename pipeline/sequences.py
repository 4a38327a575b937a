"""Token sequences as a teacher gets them, and with the distributions that it returns.

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
    """`token_ids int32 [T]`, and the positions to score as `target_spans int32 [n, 2]`; a prompt has no spans.

    `source_row` is the number of the source row that it was made from; of joined documents, the first one's.
    """

    sample_id: str
    source_row: int
    token_ids: np.ndarray
    target_spans: np.ndarray
    metadata: Mapping[str, Any] = field(default_factory=dict)


class ScoredSequence(NamedTuple):
    """A sequence with the teacher's distributions at its target positions."""

    sequence: TokenSequence
    targets: TeacherTargets

    @property
    def row(self) -> CachedRow:
        """The dataset row."""
        return CachedRow(
            sample_id=self.sequence.sample_id,
            token_ids=self.sequence.token_ids,
            target_spans=self.sequence.target_spans,
            targets=self.targets,
            metadata=self.sequence.metadata,
        )
