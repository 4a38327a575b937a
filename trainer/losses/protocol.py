"""What every loss of this folder takes and gives: what the student says where the cache can see comes in, `[M]` values
in nats go out.

Shape letters: `M` target positions, `K` teacher top-k, `N` padded draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from coldstill.trainer.targets import SparseTargets


@dataclass(frozen=True, kw_only=True)
class StudentView:
    """Natural logs of the student's full softmax, at the places that `SparseTargets` names; float32 or better.

    `log_q [M, K]`: of the kept ids; unused entries are 0. `log_q_tail [M]`: of all mass outside the kept ids together,
    -60 where the kept ids are the whole vocabulary. `log_q_draws [M, N]`: of each draw; padding is 0.
    `log_q_label [M]`: of the token that really follows.
    """

    log_q: torch.Tensor
    log_q_tail: torch.Tensor
    log_q_draws: torch.Tensor
    log_q_label: torch.Tensor

    def leaves(self) -> StudentView:
        """The same values, to be differentiated by."""
        return StudentView(**{name: tensor.detach().requires_grad_() for name, tensor in vars(self).items()})


class SparseLoss(Protocol):
    """A loss of sparse targets, written in plain torch: its gradient by the view comes from autograd, and the view's
    gradient by the logits from `student_view`, in closed form. A target that must not be differentiated is detached.
    """

    def __call__(self, view: StudentView, targets: SparseTargets, *, t: float) -> torch.Tensor:
        """Value per position `[M]` in nats; `t` in [0, 1] is TAID's, other losses do not look at it."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossValues:
    """One value per target position, in nats; nothing is averaged here.

    `loss [M]`: what is learned. `distillation [M]`: its part from the teacher alone; the schedule of t listens to it.
    `bucket_kl [M]`: KL(teacher || student) over the K kept ids and ONE symbol for all the rest: the same measure
    whatever the loss and t, made for people. It is a lower bound: never call it the KL to the teacher.
    """

    loss: torch.Tensor
    distillation: torch.Tensor
    bucket_kl: torch.Tensor

    def detached(self) -> LossValues:
        """The same values without a gradient."""
        return LossValues(**{name: tensor.detach() for name, tensor in vars(self).items()})
