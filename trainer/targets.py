"""`SparseTargets`: the cached rows of a batch come in, what the teacher knows of them as torch tensors goes out.

Shape letters: `B` rows of a batch (packs, where rows are packed), `T` tokens of each, `M` target positions of all rows,
`K` teacher top-k, `N` most draws of one position in this batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from storage_schema.rows import CachedRow


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """The teacher at the `M` target positions of a batch, and where they stand in its `[B, T]` tokens.

    `ids int64 [M, K]`, `logprobs float32 [M, K]`: kept ids, in any order, and natural logs; an unused entry repeats the
    position's first id with log-prob -inf. `log_tail float32 [M]`: log of the mass outside the kept ids.
    `labels int64 [M]`: the token that really follows; `label_logprob float32 [M]`: the teacher's log-prob of it.

    `draws int64 [M, N]`: ids outside the kept ones that stand for the tail, repeats allowed; `draw_weights float32
    [M, N]`: the share of the tail that each stands for, 0 for padding (id 0). Weights of one position sum to at most 1:
    to 1 where there are draws, to 0 where there are none. `draw_logprobs float32 [M, N]`: the teacher's log-probs of
    them, None where the dataset holds none.

    `row`, `position` `int64 [M]`: logits `[row, position]` of the batch are scored against this target, without any
    shift.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    log_tail: torch.Tensor
    labels: torch.Tensor
    label_logprob: torch.Tensor
    draws: torch.Tensor
    draw_weights: torch.Tensor
    draw_logprobs: torch.Tensor | None
    row: torch.Tensor
    position: torch.Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[CachedRow]) -> SparseTargets:
        """Targets of `rows`, in order; row `b` of the batch is `rows[b]`."""
        targets = [row.targets for row in rows]
        draw_counts = np.concatenate([item.draw_counts for item in targets]).astype(np.int64)
        drawn = np.arange(int(draw_counts.max(initial=0))) < draw_counts[:, None]
        draws = np.zeros(drawn.shape, np.int64)
        draws[drawn] = np.concatenate([item.draw_ids for item in targets])
        weights = (drawn / np.maximum(draw_counts, 1)[:, None]).astype(np.float32)
        return cls(
            ids=torch.from_numpy(np.concatenate([item.ids for item in targets]).astype(np.int64)),
            logprobs=torch.from_numpy(np.concatenate([item.logprobs for item in targets]).astype(np.float32)),
            log_tail=torch.from_numpy(np.concatenate([item.log_tail for item in targets]).astype(np.float32)),
            labels=torch.from_numpy(np.concatenate([row.labels for row in rows]).astype(np.int64)),
            label_logprob=torch.from_numpy(np.concatenate([item.label_logprob for item in targets]).astype(np.float32)),
            draws=torch.from_numpy(draws),
            draw_weights=torch.from_numpy(weights),
            draw_logprobs=None,
            row=torch.from_numpy(np.repeat(np.arange(len(rows)), [item.positions for item in targets])),
            position=torch.from_numpy(np.concatenate([row.positions for row in rows])),
        )

    @property
    def count(self) -> int:
        """M."""
        return int(self.ids.shape[0])

    @property
    def kept(self) -> torch.Tensor:
        """`bool [M, K]`: which entries are used."""
        return self.logprobs > -torch.inf

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same targets on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def part(self, start: int, stop: int) -> SparseTargets:
        """The positions from `start` up to `stop`; views, nothing is copied."""
        return self._map(lambda tensor: tensor[start:stop])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SparseTargets:
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return SparseTargets(**{name: None if it is None else function(it) for name, it in tensors.items()})
