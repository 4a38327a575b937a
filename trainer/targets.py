"""`SparseTargets`: the teacher's cached values at a batch's target positions, as torch tensors.

Shape letters: `B` rows of a batch (packs, where rows are packed), `T` tokens of each, `M` target positions of all rows,
`K` teacher top-k, `N` most draws of one position in this batch, `R` draws of all positions together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from coldstill.storage_schema.rows import TeacherTargets


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """The teacher at the `M` target positions of a batch, and their places in its `[B, T]` tokens.

    `ids int64 [M, K]`, `logprobs float32 [M, K]`: kept ids, in any order, and natural logs; an unused entry repeats the
    position's first id with log-prob -inf. `log_tail float32 [M]`: log of the mass outside the kept ids.
    `labels int64 [M]`: the token that follows in the text; `label_logprob float32 [M]`: the teacher's log-prob of it.

    `draws int64 [M, N]`: sampled ids outside the kept ones, repeats allowed; `draw_weights float32 [M, N]`: the share
    of the tail that each represents, 0 for padding (id 0). The weights of one position sum to 1 if there are draws and
    to 0 if there are none. They sum to less than 1 if ids with known log-probs were cut from the kept ones and there
    are no draws beside them. `draw_logprobs float32 [M, N]`: the teacher's log-probs of the draws, None where the
    dataset holds none.

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
    def from_joined(
        cls,
        targets: TeacherTargets,
        *,
        labels: np.ndarray,
        row: np.ndarray,
        position: np.ndarray,
        draw_weights: np.ndarray | None = None,
    ) -> SparseTargets:
        """Targets of all positions together. `draw_weights float32 [R]`: the share of the tail of each of the `R`
        draws; without them the draws of a position have equal weights that sum to 1."""
        counts = targets.draw_counts
        drawn = np.arange(int(counts.max(initial=0))) < counts[:, None]
        places = np.flatnonzero(drawn)
        if draw_weights is None:
            weights = drawn * (1 / np.maximum(counts, 1).astype(np.float32))[:, None]
        else:
            weights = _padded(draw_weights, places, drawn.shape, np.float32)
        return cls(
            ids=torch.from_numpy(targets.ids.astype(np.int64, copy=False)),
            logprobs=torch.from_numpy(targets.logprobs),
            log_tail=torch.from_numpy(targets.log_tail),
            labels=torch.from_numpy(labels.astype(np.int64, copy=False)),
            label_logprob=torch.from_numpy(targets.label_logprob),
            draws=torch.from_numpy(_padded(targets.draw_ids, places, drawn.shape, np.int64)),
            draw_weights=torch.from_numpy(weights),
            draw_logprobs=None
            if targets.draw_logprobs is None
            else torch.from_numpy(_padded(targets.draw_logprobs, places, drawn.shape, np.float32)),
            row=torch.from_numpy(row),
            position=torch.from_numpy(position),
        )

    @property
    def count(self) -> int:
        """M."""
        return int(self.ids.shape[0])

    @property
    def kept(self) -> torch.Tensor:
        """`bool [M, K]`: which entries are used."""
        return self.logprobs > -torch.inf

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same targets on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same targets in page-locked memory; torch's DataLoader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def borders(self, size: int) -> list[tuple[int, int]]:
        """Start and stop of parts of at most `size` positions, of one size; one empty part if there are no positions.

        A last part that is a sliver would move the head's whole gradient for a few positions.
        """
        parts = max(1, -(-self.count // size))
        step = max(1, -(-self.count // parts))
        return [(start, min(start + step, self.count)) for start in range(0, max(self.count, 1), step)]

    def part(self, start: int, stop: int) -> Self:
        """The positions from `start` up to `stop`, as views."""
        return self._map(lambda tensor: tensor[start:stop])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        mapped: dict[str, Any] = {name: None if it is None else function(it) for name, it in found.items()}
        return type(self)(**mapped)


def joined(targets: Sequence[TeacherTargets]) -> TeacherTargets:
    """Targets of several rows as those of one, in order; K is the largest of theirs, and `ids` are int64.

    The log-probs of the draws are kept only if all rows have them.
    """
    top_k = max(item.top_k for item in targets)
    known = all(item.draw_logprobs is not None for item in targets)
    return TeacherTargets(
        ids=np.concatenate([_widened(item.ids, top_k, item.ids[:, :1]) for item in targets], dtype=np.int64),
        logprobs=np.concatenate([_widened(item.logprobs, top_k, -np.inf) for item in targets]),
        counts=np.concatenate([item.counts for item in targets]),
        log_tail=np.concatenate([item.log_tail for item in targets]),
        label_logprob=np.concatenate([item.label_logprob for item in targets]),
        draw_ids=np.concatenate([item.draw_ids for item in targets]),
        draw_counts=np.concatenate([item.draw_counts for item in targets]),
        draw_logprobs=np.concatenate([item.draw_logprobs for item in targets]) if known else None,
    )


def _widened(values: np.ndarray, width: int, unused: np.ndarray | float) -> np.ndarray:
    """`[M, width]`: `values [M, K]`, then columns of `unused`."""
    if values.shape[1] == width:
        return values
    wide = np.empty((len(values), width), values.dtype)
    wide[:] = unused
    wide[:, : values.shape[1]] = values
    return wide


def _padded(values: np.ndarray, places: np.ndarray, shape: tuple[int, ...], kind: type) -> np.ndarray:
    """`kind [M, N]`: the flat `values [R]` at flat `places [R]`, 0 elsewhere."""
    padded: np.ndarray = np.zeros(shape, kind)
    padded.reshape(-1)[places] = values
    return padded
