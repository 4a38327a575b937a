"""Several teachers on the same positions: the weighted sum of each one's loss, from one pass over the logits.

Shape letters: `M` target positions, `E` teachers, `K` kept ids of one teacher, `W` sum of all `K`, `N` padded draws.

The two passes over `[M, V]` logits read the union U of all teachers' kept ids and draws. Each teacher's
`StudentLogProbs` follow from those in `[M, W]` numbers: with S its own kept ids, the student's mass outside S is the
mass outside U plus that of the ids in U but not in S. All of these are sums of positive terms, so no digits are lost,
and autograd gives the gradient with respect to the union's log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from coldstill.trainer.targets import SparseTargets

from .fused_head import Objective, SparseLoss
from .logit_view import StudentLogProbs


@dataclass(frozen=True, kw_only=True)
class EnsembleTargets(SparseTargets):
    """The union of several teachers' kept ids and draws, and the targets of each teacher.

    `ids`, `logprobs [M, W]`: each id of the union once, with log-prob 0; -inf marks the entries that are not used.
    `draws [M, N of all teachers]` with their weights. `log_tail` and `label_logprob` are those of the first teacher.
    `teachers`: E targets of the same positions. `columns int64 [M, W]`: for each teacher's kept ids, side by side, the
    column of `ids` that has the id.
    """

    teachers: tuple[SparseTargets, ...]
    columns: torch.Tensor

    @classmethod
    def of(cls, teachers: Sequence[SparseTargets]) -> EnsembleTargets:
        """The targets of all `teachers`, which have the same rows, positions and labels."""
        first = teachers[0]
        ids = torch.cat([one.ids for one in teachers], 1)
        # Of equal ids the leftmost counts. An unused entry repeats an id of its own teacher, to the right of it.
        ascending, order = ids.sort(dim=1, stable=True)
        is_new = torch.ones_like(ids, dtype=torch.bool)
        is_new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
        places = torch.arange(ids.shape[1]).expand_as(ids)
        leftmost = order.gather(1, places.where(is_new, 0).cummax(1).values)
        columns = torch.empty_like(order).scatter_(1, order, leftmost)
        is_used = columns == places
        return cls(
            ids=ids.where(is_used, ids[:, :1]),
            logprobs=torch.where(is_used, 0.0, -torch.inf),
            log_tail=first.log_tail,
            labels=first.labels,
            label_logprob=first.label_logprob,
            draws=torch.cat([one.draws for one in teachers], 1),
            draw_weights=torch.cat([one.draw_weights for one in teachers], 1),
            draw_logprobs=None,
            row=first.row,
            position=first.position,
            teachers=tuple(teachers),
            columns=columns,
        )

    def student_by_teacher(self, student: StudentLogProbs) -> list[StudentLogProbs]:
        """The log-probs that each teacher's targets name, from those that the union names."""
        found, column, draw = [], 0, 0
        for teacher in self.teachers:
            top_k, draws = teacher.ids.shape[1], teacher.draws.shape[1]
            own = self.columns[:, column : column + top_k]
            is_other = self.kept.scatter(1, own, False)
            outside = torch.cat([student.log_q.masked_fill(~is_other, -torch.inf), student.log_q_tail[:, None]], 1)
            found.append(
                StudentLogProbs(
                    log_q=student.log_q.gather(1, own).masked_fill(~teacher.kept, 0),
                    log_q_tail=outside.logsumexp(1),
                    log_q_draws=student.log_q_draws[:, draw : draw + draws],
                    log_q_label=student.log_q_label,
                )
            )
            column, draw = column + top_k, draw + draws
        return found

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> EnsembleTargets:
        whole = [teacher._map(function) for teacher in self.teachers]
        names = ("ids", "logprobs", "log_tail", "labels", "label_logprob", "draws", "draw_weights", "row", "position")
        changes: dict[str, Any] = {name: function(getattr(self, name)) for name in (*names, "columns")}
        return replace(self, teachers=tuple(whole), **changes)


@dataclass(frozen=True)
class TeacherLosses:
    """The loss of each teacher's targets, and its `shares`, which sum to 1. `state`: of all losses that keep one."""

    losses: tuple[SparseLoss, ...]
    shares: tuple[float, ...]
    state: Any = None

    def __call__(self, student: StudentLogProbs, targets: EnsembleTargets, *, t: float) -> torch.Tensor:
        """Weighted sum `[M]`."""
        return self.of_teachers(targets.student_by_teacher(student), targets, t=t)

    def of_teachers(self, students: Sequence[StudentLogProbs], targets: EnsembleTargets, *, t: float) -> torch.Tensor:
        """Weighted sum `[M]`; `students` is the result of `targets.student_by_teacher`."""
        parts = zip(self.shares, self.losses, students, targets.teachers, strict=True)
        return torch.stack([share * loss(of, teacher, t=t) for share, loss, of, teacher in parts]).sum(0)


@dataclass(frozen=True)
class EnsembleObjective(Objective):
    """`(1 - s)` times the weighted sum of the teachers' losses, and s times the cross-entropy, which counts once."""

    distillation: TeacherLosses  # type: ignore[assignment]

    def compared(
        self, student: StudentLogProbs, targets: SparseTargets, *, t: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values `[M]` for `EnsembleTargets`: both are weighted sums of the teachers' ones."""
        assert isinstance(targets, EnsembleTargets)
        students = targets.student_by_teacher(student)
        distillation = self.distillation.of_teachers(students, targets, t=t)
        with torch.no_grad():
            each = zip(self.distillation.shares, students, targets.teachers, strict=True)
            return distillation, torch.stack([part * of.buckets(teacher).kl() for part, of, teacher in each]).sum(0)
