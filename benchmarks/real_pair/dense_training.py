"""TAID and forward KL from the whole distribution of the teacher, trained by `coldstill.train` like a cached side.

Only the gradient differs: rows and their order, optimizer, schedule of t, checkpoints and resuming are the trainer's.

Shape letters: `M` target positions, `C` of a chunk, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch

import coldstill.trainer.train as trainer
from benchmarks.common.whole_teacher import HiddenStates, in_batch
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.distill_trainer import DistillTrainer
from coldstill.trainer.loss_kernels.fused_head import LossValues
from coldstill.trainer.loss_kernels.logit_view import RowPasses, StudentLogProbs
from coldstill.trainer.targets import SparseTargets


class DenseObjective:
    """`KL(softmax((1 - t) z_student + t z_teacher) || student)` over the whole vocabulary, with no gradient through the
    target: TAID (arXiv 2501.16937), and forward KL at t = 1. Chunks of a batch come in order."""

    def __init__(self, head: torch.Tensor):
        """`head [V, D]`: the teacher's."""
        self._head = head
        self._left = head[:0]

    def begin(self, hidden: torch.Tensor) -> None:
        """The next chunks are of a batch at whose targets the teacher's last hidden states are `hidden [M, D]`."""
        self._left = hidden

    def forward_backward_(
        self,
        logits: torch.Tensor,
        targets: SparseTargets,
        *,
        t: float,
        with_gradient: bool,
        passes: RowPasses | None = None,
    ) -> LossValues:
        """Values of `logits [C, V]`, which then hold the gradient of their sum."""
        hidden = self._left[: targets.count]
        self._left = self._left[targets.count :]
        log_q = logits.sub_(logits.logsumexp(1, keepdim=True))
        target = hidden.to(logits.dtype) @ self._head.T.to(logits.dtype)
        target.lerp_(log_q, 1 - t)
        log_p = target.sub_(target.logsumexp(1, keepdim=True))
        bucket_kl = _kept(log_q, targets).buckets(targets).kl()
        p = log_p.exp()
        value = (p * log_p.sub_(log_q)).sum(1)
        torch.exp(log_q, out=logits).sub_(p)
        return LossValues(loss=value, distillation=value, bucket_kl=bucket_kl)


def _kept(log_q: torch.Tensor, targets: SparseTargets) -> StudentLogProbs:
    of_kept = log_q.gather(1, targets.ids).masked_fill(~targets.kept, -torch.inf)
    log_tail = torch.log1p(-of_kept.exp().sum(1).clamp_max(1 - 1e-6))
    return StudentLogProbs(
        log_q=of_kept.masked_fill(~targets.kept, 0),
        log_q_tail=log_tail,
        log_q_draws=log_q.gather(1, targets.draws),
        log_q_label=log_q.gather(1, targets.labels[:, None])[:, 0],
    )


class DenseTrainer(DistillTrainer):
    """`DistillTrainer` with a `DenseObjective`; the dataset gives rows, order and labels."""

    def __init__(self, *arguments: Any, states: HiddenStates, head: torch.Tensor, **settings: Any):
        """`states`, `head`: of the teacher, at the target positions of every row of the training dataset."""
        super().__init__(*arguments, **settings)
        self._states, self._starts = states, states.starts
        # Not an `Objective`, which has no place for the teacher's hidden states; the loss calls one method of it only.
        self.objective: Any = DenseObjective(head)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **settings: Any) -> Any:
        """As `DistillTrainer`."""
        self.objective.begin(in_batch(self._states, self._starts, inputs["sample_ids"]))
        return super().compute_loss(model, inputs, *arguments, **settings)


def train_dense(config: TrainConfig, states: HiddenStates, head: torch.Tensor) -> trainer.TrainSummary:
    """`coldstill.train(config)` against the whole distribution. The loss of `config` is taid or forward_kl."""
    if config.loss.name not in ("taid", "forward_kl"):
        raise ValueError(f"no dense form of the loss {config.loss.name} here; taid and forward_kl have one")
    with mock.patch.object(trainer, "DistillTrainer", partial(DenseTrainer, states=states, head=head)):
        return trainer.train(config)
