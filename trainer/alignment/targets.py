"""`AlignedTargets`: a batch's targets in the student's tokens, made of the stored ones.

Shape letters: `M` target positions of the student, `K` teacher top-k, `N` most draws, `E` positions whose chunk is one
token on both sides and of which a kept id is an id of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from coldstill.storage_schema.rows import LOG_FLOOR, CachedRow
from coldstill.trainer.data.collate import IGNORED
from coldstill.trainer.data.subsample import with_smaller_top_k
from coldstill.trainer.targets import SparseTargets, joined

from .aligned_rows import AlignedRow


@dataclass(frozen=True, kw_only=True)
class AlignedTargets(SparseTargets):
    """Targets of a student with another tokenizer; all ids are the student's.

    `exact bool [M]`: E positions whose distribution is the teacher's at a token of the same bytes. Ids without a token
    of the student are in the tail. At all others, the distribution is the label alone and means nothing.
    `chunk int64 [M]`: the chunk of the label in this batch, -1 if it is lost; the tokens of a chunk follow each other.
    `chunk_logprob float32 [M]`: the teacher's log-prob of all tokens of that chunk. `byte_counts int64 [M]`: bytes of
    text of the label.
    """

    exact: torch.Tensor
    chunk: torch.Tensor
    chunk_logprob: torch.Tensor
    byte_counts: torch.Tensor

    @property
    def in_larger_chunk(self) -> torch.Tensor:
        """`bool [M]`: labels in a chunk that is not `exact`."""
        return ~self.exact & (self.chunk >= 0)

    def distributions(self) -> SparseTargets:
        """The targets of the E positions that are `exact`."""
        found = {item.name: getattr(self, item.name) for item in fields(SparseTargets)}
        chosen: dict[str, Any] = {name: None if it is None else it[self.exact] for name, it in found.items()}
        return SparseTargets(**chosen)

    def borders(self, size: int) -> list[tuple[int, int]]:
        """Parts of about `size` positions that split no chunk."""
        chunk = self.chunk.tolist()
        found, start = [], 0
        while start < len(chunk):
            stop = min(start + size, len(chunk))
            while stop - 1 > start and stop < len(chunk) and chunk[stop] >= 0 and chunk[stop] == chunk[stop - 1]:
                stop -= 1
            while stop < len(chunk) and chunk[stop] >= 0 and chunk[stop] == chunk[stop - 1]:
                stop += 1  # one chunk is longer than `size`
            found.append((start, stop))
            start = stop
        return found or [(0, 0)]


def collate_aligned(
    rows: Sequence[CachedRow], aligned: Sequence[AlignedRow], id_map: np.ndarray, *, top_k: int | None
) -> dict[str, Any]:
    """The batch of `collate` in the student's tokens, with `AlignedTargets`; a row may have no target.

    `id_map int64 [V]`: of `map_ids`.
    """
    length = max(row.token_ids.size for row in aligned)
    ids, mask = np.zeros((2, len(rows), length), np.int64)
    for number, row in enumerate(aligned):
        ids[number, : row.token_ids.size] = row.token_ids
        mask[number, : row.token_ids.size] = 1
    owner = np.repeat(np.arange(len(rows)), [row.positions.size for row in aligned])
    position = np.concatenate([row.positions for row in aligned])
    labels = np.full_like(ids, IGNORED)
    labels[owner, position] = following = ids[owner, position + 1]
    targets = _targets(rows, aligned, id_map, top_k=top_k, labels=following, row=owner, position=position)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(np.where(mask > 0, np.arange(length), 0)),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "targets": targets,
        "sample_ids": [row.sample_id for row in rows],
        "target_samples": torch.from_numpy(owner),
    }


def _targets(
    rows: Sequence[CachedRow],
    aligned: Sequence[AlignedRow],
    id_map: np.ndarray,
    *,
    top_k: int | None,
    labels: np.ndarray,
    row: np.ndarray,
    position: np.ndarray,
) -> AlignedTargets:
    stored = joined([each.targets for each in rows])
    shares = None
    if top_k is not None and top_k < stored.top_k:
        stored, shares = with_smaller_top_k(stored, top_k)
    places = np.zeros(stored.positions, np.int64)  # of the stored positions, which the mapping does not need
    teacher = SparseTargets.from_joined(stored, labels=places, row=places, position=places, draw_weights=shares)

    firsts = np.cumsum([0, *(each.positions.size for each in rows)])
    source = _numbered([one.source for one in aligned], firsts)
    chunk = _numbered(
        [one.chunk for one in aligned], np.cumsum([0, *(one.chunk.max(initial=-1) + 1 for one in aligned)])
    )
    exact = source >= 0
    labels_of_teacher = np.concatenate([each.token_ids[each.positions + 1] for each in rows])
    exact[exact] = id_map[labels_of_teacher[source[exact]]] == labels[exact]
    images = torch.from_numpy(id_map)
    exact[exact] = ((images[teacher.ids] >= 0) & teacher.kept)[source[exact]].any(1).numpy()
    mapped = _mapped(teacher, torch.from_numpy(source[exact]), images)
    at = torch.from_numpy(np.flatnonzero(exact))
    count, width, drawn = labels.size, teacher.ids.shape[1], teacher.draws.shape[1]
    label = torch.from_numpy(labels)

    def filled(empty: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        empty[at] = values
        return empty

    alone = torch.full((count, width), -torch.inf)
    alone[:, 0] = 0
    chunk_logprob = torch.from_numpy(np.concatenate([one.chunk_logprob for one in aligned]).astype(np.float32))
    return AlignedTargets(
        ids=filled(label[:, None].repeat(1, width), mapped.ids),
        logprobs=filled(alone, mapped.logprobs),
        log_tail=filled(torch.full((count,), LOG_FLOOR), mapped.log_tail),
        labels=label,
        label_logprob=filled(chunk_logprob.clone(), mapped.label_logprob),
        draws=filled(torch.zeros(count, drawn, dtype=torch.long), mapped.draws),
        draw_weights=filled(torch.zeros(count, drawn), mapped.draw_weights),
        draw_logprobs=None if mapped.draw_logprobs is None else filled(torch.zeros(count, drawn), mapped.draw_logprobs),
        row=torch.from_numpy(row),
        position=torch.from_numpy(position),
        exact=torch.from_numpy(exact),
        chunk=torch.from_numpy(chunk),
        chunk_logprob=chunk_logprob,
        byte_counts=torch.from_numpy(np.concatenate([one.byte_counts for one in aligned])),
    )


def _mapped(teacher: SparseTargets, source: torch.Tensor, images: torch.Tensor) -> SparseTargets:
    """The stored targets numbered `source`, with ids of the student.

    A kept id without an image joins the tail with its mass. A draw without one is left out, and the weights of the
    others stay shares of the whole tail: with `m` the stored tail and `m'` the new one, that of each is `m / m'` of
    what it was. So the target of each mapped id in the tail is unbiased, and the mass of ids without an image has the
    shape of the student's own tail.
    """
    found = {item.name: getattr(teacher, item.name) for item in fields(SparseTargets)}
    chosen: dict[str, Any] = {name: None if it is None else it[source] for name, it in found.items()}
    one = SparseTargets(**chosen)
    ids, drawn = images[one.ids], images[one.draws]
    stays = (ids >= 0) & one.kept
    lost = one.logprobs.double().masked_fill(stays, -torch.inf)
    old_tail = one.log_tail.double()
    new_tail = torch.cat([lost, old_tail[:, None]], 1).logsumexp(1)
    # An unused entry repeats a used id.
    first = ids.gather(1, stays.long().argmax(1, keepdim=True)) if ids.numel() else ids
    weights = one.draw_weights * (drawn >= 0) * (old_tail - new_tail).exp().float()[:, None]
    # A draw may be the image of no kept id: images are distinct, and a draw is outside the kept ids.
    return replace(
        one,
        ids=torch.where(stays, ids, first),
        logprobs=one.logprobs.masked_fill(~stays, -torch.inf),
        log_tail=new_tail.float().clamp_max(0),
        draws=drawn.clamp_min(0),
        draw_weights=weights,
    )


def _numbered(parts: Sequence[np.ndarray], firsts: np.ndarray) -> np.ndarray:
    """The numbers of all parts together, each counted from its entry of `firsts`; -1 stays."""
    return np.concatenate([np.where(part >= 0, part + first, -1) for part, first in zip(parts, firsts, strict=False)])
