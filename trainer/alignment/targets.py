"""`AlignedTargets`: a batch's targets in the student's tokens, made of the stored ones.

Shape letters: `M` target positions of the student, `K` teacher top-k, `N` most draws, `E` positions at the first token
of a chunk that is one token of the teacher, and of which a kept id has an image of the student.
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

    `exact bool [M]`: E positions whose distribution is the teacher's of the student's next token: the mass of each of
    the teacher's ids is at the first token that writes its bytes. Ids without such a token are in the tail. At all
    others, the distribution is the label alone and means nothing. `chunk int64 [M]`: the chunk of the label in this
    batch, -1 if it is lost; the tokens of a chunk follow each other. `chunk_logprob float32 [M]`: the teacher's
    log-prob of the chunk's tokens that are not `exact`, given the one that is. `byte_counts int64 [M]`: bytes of
    text of the label.
    """

    exact: torch.Tensor
    chunk: torch.Tensor
    chunk_logprob: torch.Tensor
    byte_counts: torch.Tensor

    @property
    def in_larger_chunk(self) -> torch.Tensor:
        """`bool [M]`: labels in a chunk that are not `exact`."""
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
    labels_of_teacher = np.concatenate([each.token_ids[each.positions + 1] for each in rows])
    teacher = SparseTargets.from_joined(
        stored, labels=labels_of_teacher, row=places, position=places, draw_weights=shares
    )

    firsts = np.cumsum([0, *(each.positions.size for each in rows)])
    source = _numbered([one.source for one in aligned], firsts)
    chunk = _numbered(
        [one.chunk for one in aligned], np.cumsum([0, *(one.chunk.max(initial=-1) + 1 for one in aligned)])
    )
    exact = source >= 0
    exact[exact] = id_map[labels_of_teacher[source[exact]]] == labels[exact]
    images = torch.from_numpy(id_map)
    exact[exact] = ((images[teacher.ids] >= 0) & teacher.kept)[source[exact]].any(1).numpy()
    mapped = _mapped(teacher, torch.from_numpy(source[exact]), images, torch.from_numpy(labels[exact]))
    # The rest of the chunk, given its first token.
    chunk_logprob = np.concatenate([one.chunk_logprob for one in aligned])
    of_first = np.zeros(chunk.max(initial=-1) + 2)  # the last is of lost tokens
    of_first[chunk[exact]] = mapped.label_logprob.numpy()
    chunk_logprob = torch.from_numpy(np.minimum(chunk_logprob - of_first[chunk], 0).astype(np.float32))
    at = torch.from_numpy(np.flatnonzero(exact))
    count, width, drawn = labels.size, teacher.ids.shape[1], teacher.draws.shape[1]
    label = torch.from_numpy(labels)

    def filled(empty: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        empty[at] = values
        return empty

    alone = torch.full((count, width), -torch.inf)
    alone[:, 0] = 0
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


def _mapped(teacher: SparseTargets, source: torch.Tensor, images: torch.Tensor, label: torch.Tensor) -> SparseTargets:
    """The stored targets numbered `source` in ids of the student, whose labels are `label int64 [E]`.

    The mass of an image is that of all kept ids with that image, and of draws with it: a draw stands for its weight of
    the tail. Kept ids without an image join the tail. A draw without one is left out, and the weights of the others
    stay shares of the whole tail: with `m` the stored tail and `m'` the new one, that of each is `m / m'` of what it
    was. The mass of ids without an image has the shape of the student's own tail. Given that there are draws, and that
    not all of them join a kept image, the target of each image is unbiased.
    """
    found = {item.name: getattr(teacher, item.name) for item in fields(SparseTargets)}
    chosen: dict[str, Any] = {name: None if it is None else it[source] for name, it in found.items()}
    one = SparseTargets(**chosen)
    ids, drawn = images[one.ids], images[one.draws]
    stays = (ids >= 0) & one.kept
    ids, mass = _merged(ids, one.logprobs.double().exp(), stays)
    old_tail = one.log_tail.double()
    of_draws = one.draw_weights.double() * old_tail.exp()[:, None]
    # The label's own mass, before draws add to it.
    of_label = torch.where(ids == label[:, None], mass, 0).sum(1)
    label_logprob = one.label_logprob.double()
    label_is_kept = ((one.ids == one.labels[:, None]) & one.kept).any(1)
    of_label += torch.where(label_is_kept, 0, label_logprob.exp())

    place = torch.searchsorted(ids, drawn).clamp_max(ids.shape[1] - 1)
    joins = (ids.gather(1, place) == drawn) & (drawn >= 0) & (of_draws > 0)
    share = torch.where(joins, one.draw_weights.double(), 0)
    # Where all n draws join, n / (n + 1) of the tail does (Laplace's rule): a tail without mass would be wrong.
    count = (of_draws > 0).sum(1)
    share *= (count / (count + 1) / share.sum(1).clamp_min(1e-9)).clamp_max(1)[:, None]
    mass = mass.scatter_add(1, place, share * old_tail.exp()[:, None])
    lost = one.logprobs.double().masked_fill((images[one.ids] >= 0) | ~one.kept, -torch.inf)
    left = old_tail + torch.log1p(-share.sum(1))
    new_tail = torch.cat([lost, left[:, None]], 1).logsumexp(1)
    weights = torch.where(joins | (drawn < 0), 0, of_draws / new_tail.exp()[:, None])
    used = mass > 0
    return replace(
        one,
        ids=torch.where(used, ids, ids[:, :1]),
        logprobs=mass.log().float(),
        log_tail=new_tail.float().clamp_max(0),
        label_logprob=torch.maximum(label_logprob, of_label.log()).float().clamp_max(0),
        draws=torch.where(weights > 0, drawn, 0),
        draw_weights=weights.float(),
    )


def _merged(ids: torch.Tensor, mass: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids `[E, K]`, ascending, and the mass of each; unused entries come last, with mass 0.

    `used bool [E, K]`: the entries of `ids` and `mass` that count; each row has one."""
    beyond = torch.iinfo(ids.dtype).max
    ordered, order = ids.masked_fill(~used, beyond).sort(1)
    begins = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    place = begins.cumsum(1) - 1
    of_ids = torch.full_like(ids, beyond).scatter(1, place, ordered)
    return of_ids, torch.zeros_like(mass).scatter_add(1, place, (mass * used).gather(1, order))


def _numbered(parts: Sequence[np.ndarray], firsts: np.ndarray) -> np.ndarray:
    """The numbers of all parts together, each counted from its entry of `firsts`; -1 stays."""
    return np.concatenate([np.where(part >= 0, part + first, -1) for part, first in zip(parts, firsts, strict=False)])
