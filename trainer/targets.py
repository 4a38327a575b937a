"""`SparseTargets`: the cached rows of a batch come in, what the teacher knows of them as torch tensors goes out.

Shape letters: `B` rows of a batch, `T` tokens of its longest row, `M` target positions of all rows, `K` teacher
top-k, `N` most draws of one position in this batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from storage_schema.rows import CachedRow


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """The teacher at the `M` target positions of a batch, and where they stand in the right-padded `[B, T]` batch.

    `ids int64 [M, K]`, `logprobs float32 [M, K]`: kept ids and natural logs; an unused entry repeats the position's
    first id with log-prob -inf. `log_tail float32 [M]`: log of the mass outside the kept ids. `labels int64 [M]`: the
    token that really follows; `label_logprob float32 [M]`: the teacher's log-prob of it. `draws int64 [M, N]`: tail
    draws, repeats allowed, padded with id 0; `draw_counts int64 [M]`: how many of them count. `row`, `position`
    `int64 [M]`: logits `[row, position]` of the padded batch are scored against this target, without any shift.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    log_tail: torch.Tensor
    labels: torch.Tensor
    label_logprob: torch.Tensor
    draws: torch.Tensor
    draw_counts: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[CachedRow]) -> SparseTargets:
        """Targets of `rows`, in order; row `b` of the batch is `rows[b]`."""
        targets = [row.targets for row in rows]
        draw_counts = np.concatenate([item.draw_counts for item in targets]).astype(np.int64)
        draws = np.zeros((draw_counts.size, int(draw_counts.max(initial=0))), np.int64)
        draws[np.arange(draws.shape[1]) < draw_counts[:, None]] = np.concatenate([item.draw_ids for item in targets])
        return cls(
            ids=torch.from_numpy(np.concatenate([item.ids for item in targets]).astype(np.int64)),
            logprobs=torch.from_numpy(np.concatenate([item.logprobs for item in targets]).astype(np.float32)),
            log_tail=torch.from_numpy(np.concatenate([item.log_tail for item in targets]).astype(np.float32)),
            labels=torch.from_numpy(np.concatenate([row.labels for row in rows]).astype(np.int64)),
            label_logprob=torch.from_numpy(np.concatenate([item.label_logprob for item in targets]).astype(np.float32)),
            draws=torch.from_numpy(draws),
            draw_counts=torch.from_numpy(draw_counts),
            row=torch.from_numpy(np.repeat(np.arange(len(rows)), [item.positions for item in targets])),
            position=torch.from_numpy(np.concatenate([row.positions for row in rows])),
        )

    @property
    def count(self) -> int:
        """M."""
        return int(self.ids.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same targets on another device."""
        moved = {item.name: getattr(self, item.name).to(device, non_blocking=non_blocking) for item in fields(self)}
        return SparseTargets(**moved)
