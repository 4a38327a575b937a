"""Held-out figures of a student against the whole teacher.

Shape letters: `M` target positions, `D` width, `V` vocabulary. All logs are natural; figures are means per target.

Definitions are those of `coldstill evaluate` with a resident teacher, which ranks all ids again for each student. Here
the teacher's part is computed once: the rank border of the last fifth of ids, its ten most probable ids, its entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.whole_teacher import HiddenStates, last_hidden
from coldstill.common.files import new_file
from coldstill.trainer.evaluation.figures import HEAD_IDS, LAST_SHARE

_AT_ONCE, _IN_CACHE = 128, 2
"""Positions of a chunk: two float32 arrays `[128, 262144]` are 270 MB. Figures are computed for two of them at a time:
with more, whose arrays glibc maps anew from the system each time, they take four times as long."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A part of the held-out rows. `border float32 [M]`: the teacher's log-prob above which the ids are that are not in
    its last fifth."""

    states: HiddenStates
    head: torch.Tensor
    labels: torch.Tensor
    border: torch.Tensor

    def logits(self, start: int) -> torch.Tensor:
        """The teacher's logits `[m, V]` of the chunk that starts at this position."""
        return self.states.hidden[start : start + _AT_ONCE] @ self.head.T

    def at(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels `[m]` and borders `[m, 1]` of that chunk."""
        return self.labels[start : start + _AT_ONCE], self.border[start : start + _AT_ONCE, None]

    @property
    def chunks(self) -> Iterator[int]:
        """Start of each chunk."""
        return iter(tqdm(range(0, len(self.labels), _AT_ONCE), desc="measuring", leave=False))


@torch.inference_mode()
def held_out(states: HiddenStates, head: torch.Tensor, *, path: Path) -> HeldOut:
    """The part with these rows; the file at `path` keeps the borders."""
    labels = torch.cat([ids[at + 1] for ids, at in zip(states.tokens, states.positions, strict=True)])
    part = HeldOut(states=states, head=head, labels=labels, border=torch.empty(0))
    if path.exists():
        border = torch.load(path, weights_only=True)
    else:
        last = -(-len(head) // LAST_SHARE)
        border = torch.cat([part.logits(start).log_softmax(1).kthvalue(last, dim=1).values for start in part.chunks])
        with new_file(path) as beside:
            torch.save(border, beside)
    return HeldOut(states=states, head=head, labels=labels, border=border)


@torch.inference_mode()
def teacher_figures(part: HeldOut, *, top_k: int) -> dict[str, float]:
    """Cross-entropy and entropy of the teacher, and its mass outside its `top_k` and on its last fifth of ids."""
    sums: dict[str, float] = {}
    for start in part.chunks:
        log_p = part.logits(start).log_softmax(1)
        p, (labels, border) = log_p.exp(), part.at(start)
        _add(
            sums,
            cross_entropy=-log_p.gather(1, labels[:, None])[:, 0],
            entropy=-(p * log_p).sum(1),
            tail_mass=1 - p.topk(top_k, dim=1).values.double().sum(1),
            head_mass=p.topk(HEAD_IDS, dim=1).values.sum(1),
            last_fifth_mass=(p * (log_p <= border)).sum(1),
        )
    return {name: total / len(part.labels) for name, total in sums.items()}


@torch.inference_mode()
def student_figures(student: Any, part: HeldOut) -> dict[str, float]:
    """Figures of `student`, a causal language model of transformers with the teacher's vocabulary.

    - `kl`: KL(teacher || student), `reverse_kl`: KL(student || teacher), over the whole vocabulary.
    - `cross_entropy` of the text, `entropy` of the student, `top1_agreement`: share with the same most probable id.
    - `head_mass`, `last_fifth_mass`: the student's mass on the teacher's ten most and its fifth least probable ids.
    - `teacher_mass_on_head`: the teacher's mass on the student's ten most probable ids.
    """
    hidden = last_hidden(student.eval(), part.states.tokens, part.states.positions, desc="student")
    head = student.lm_head.weight
    sums: dict[str, float] = {}
    for start in part.chunks:
        of_chunk = part.logits(start), hidden[start : start + _AT_ONCE] @ head.T, *part.at(start)
        for of_teacher, of_student, labels, border in zip(*(each.split(_IN_CACHE) for each in of_chunk), strict=True):
            _add(sums, **_compared(of_teacher.log_softmax(1), of_student.log_softmax(1), labels, border))
    return {name: total / len(part.labels) for name, total in sums.items()}


def _compared(
    log_p: torch.Tensor, log_q: torch.Tensor, labels: torch.Tensor, border: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The figures of each position, from the log-probs `[m, V]` of teacher and student."""
    p, q = log_p.exp(), log_q.exp()
    of_teacher, of_student = log_p.topk(HEAD_IDS, dim=1).indices, log_q.topk(HEAD_IDS, dim=1).indices
    return {
        "cross_entropy": -log_q.gather(1, labels[:, None])[:, 0],
        "entropy": -(q * log_q).sum(1),
        "top1_agreement": (of_teacher[:, 0] == of_student[:, 0]).double(),
        "head_mass": q.gather(1, of_teacher).sum(1),
        "teacher_mass_on_head": p.gather(1, of_student).sum(1),
        "last_fifth_mass": (q * (log_p <= border)).sum(1),
        "kl": (p * (log_p - log_q)).sum(1),
        "reverse_kl": (q * (log_q - log_p)).sum(1),
    }


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """The figures as they are stored, to six digits after the point."""
    return {name: round(value, 6) for name, value in figures.items()}


def _add(sums: dict[str, float], **values: torch.Tensor) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.double().sum().item()
