"""What a student with another tokenizer minimizes: the loss where it has the teacher's distribution, ALM elsewhere.

Shape letters: `M` target positions of the student, `E` of them with the teacher's distribution (`exact`), `C` chunks
with other tokens.

ALM (arXiv 2503.20083) compares the two probabilities of a chunk c of text, or of what follows its first token where
that is exact. With a temperature tau:

    x = P_teacher(c)^(1/tau),  y = P_student(c)^(1/tau),  loss = x log(x / y) + (1 - x) log((1 - x) / (1 - y))

The paper's binary cross-entropy differs from it by the entropy of x, a constant. The value here is tau times that. For
large tau it tends to `b - a + a log(a / b)`, with a and b the surprise `-log P` of teacher and student, and its
gradient to `1 - a / b` times that of the cross-entropy of each token of the chunk. So one step has the same size for
any tau, and its tokens weigh as much as tokens of other losses. It counts once for a chunk; each of its tokens has an
equal share.

The loss of a step is the sum over all target positions, divided by their number, lost ones included. Lost tokens have a
loss only with `cross_entropy_share`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coldstill.trainer.loss_kernels.fused_head import LossValues, Objective
from coldstill.trainer.loss_kernels.logit_view import StudentLogProbs
from coldstill.trainer.losses.base import LossState
from coldstill.trainer.targets import SparseTargets

from .targets import AlignedTargets

SMALLEST_SURPRISE = 1e-6
"""Of a chunk, in nats: keeps logs and their gradients finite where a model is certain."""

COUNTS = ("one_to_one", "in_larger_chunks", "lost", "rows", "skipped_rows")


class AlignmentCounts(LossState):
    """Counts of the run so far by the names of `COUNTS`, and the two parts of the loss in the last step.

    The trainer adds the counts of each micro-batch, and the objective adds its values.
    """

    def __init__(self) -> None:
        super().__init__(sums=len(COUNTS) + 2)

    def add_batch(self, batch: Mapping[str, Any]) -> None:
        """Count the rows and positions of a micro-batch."""
        targets: AlignedTargets = batch["targets"]
        one_to_one, larger = targets.exact.sum(), targets.in_larger_chunk.sum()
        rows, skipped = len(batch["sample_ids"]), len(batch["skipped"])
        counts = (one_to_one, larger, targets.count - one_to_one - larger, rows, skipped)
        self.add(*map(torch.as_tensor, counts), *torch.zeros(2))

    def add_values(self, of_tokens: torch.Tensor, of_chunks: torch.Tensor) -> None:
        """Add the two parts of a loss, each summed."""
        self.add(*of_tokens.new_zeros(len(COUNTS)), of_tokens, of_chunks)

    def initial_state(self) -> dict[str, Any]:
        return {**dict.fromkeys(COUNTS, 0), "one_to_one_loss": 0.0, "chunk_loss": 0.0}

    def update(self, sums: Sequence[float], *, step: int, total_steps: int) -> None:
        """`sums`: of the optimizer step, on all devices."""
        *counts, of_tokens, of_chunks = sums
        for name, count in zip(COUNTS, counts, strict=True):
            self._state[name] += round(count)
        self._state["one_to_one_loss"] = of_tokens / max(1, counts[0])
        self._state["chunk_loss"] = of_chunks / max(1, counts[1])

    def logs(self) -> dict[str, float]:
        """Shares of the target positions so far, and the means of the last step per position of each kind."""
        total = max(1, sum(self._state[name] for name in COUNTS[:3]))
        shares = {f"share_{name}": self._state[name] / total for name in COUNTS[:3]}
        return {**shares, **{name: self._state[name] for name in ("skipped_rows", "one_to_one_loss", "chunk_loss")}}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)


def alignment_counts(record: Mapping[str, Any]) -> dict[str, float] | None:
    """The state of `AlignmentCounts` in the state of a `StepRecord`; None for a run without."""
    saved = record.get("memory")
    return dict(saved) if saved is not None and COUNTS[0] in saved else None


def alignment_facts(counts: Mapping[str, float]) -> dict[str, str]:
    """What the model card says of `AlignmentCounts`."""
    total = max(1, sum(counts[name] for name in COUNTS[:3]))
    one, larger, lost = (f"{counts[name] / total:.1%}" for name in COUNTS[:3])
    kinds = f"{one} with the teacher's distribution, {larger} others in larger chunks (ALM), {lost} lost"
    return {
        "student's tokenizer": "not the teacher's: its tokens were aligned with the teacher's by bytes of the text",
        "target tokens by kind": kinds,
        "rows skipped": f"{counts['skipped_rows']:,} of {counts['rows']:,}",
    }


@dataclass(frozen=True)
class _Stated:
    """Carries the counts to where the trainer finds the state of a loss."""

    state: AlignmentCounts


@dataclass(frozen=True, kw_only=True)
class AlignedObjective(Objective):
    """`one_to_one * loss` at exact tokens, `chunks * ALM` at other tokens of chunks, mixed with the labels'
    cross-entropy as by `cross_entropy_share`.

    `inner`: the loss at exact tokens; None is the cross-entropy of all positions alone.
    """

    inner: Objective | None
    one_to_one: float
    chunks: float
    temperature: float

    @classmethod
    def of(cls, inner: Objective | None, *, one_to_one: float, chunks: float, temperature: float) -> AlignedObjective:
        """With counts of its own."""
        counts: Any = _Stated(AlignmentCounts())
        share = 0.0 if inner is None else inner.cross_entropy_share
        return cls(counts, share, inner=inner, one_to_one=one_to_one, chunks=chunks, temperature=temperature)

    @property
    def counts(self) -> AlignmentCounts:
        """What the trainer adds batches to, and saves."""
        found: AlignmentCounts = self.distillation.state  # type: ignore[attr-defined]
        return found

    def __call__(self, student: StudentLogProbs, targets: SparseTargets, *, t: float) -> LossValues:
        """Values of the `M` positions of `AlignedTargets`; `bucket_kl` is 0 where a position is not exact."""
        assert isinstance(targets, AlignedTargets)
        surprise = -student.log_q_label
        if self.inner is None:
            zeros = torch.zeros_like(surprise, requires_grad=False)
            return LossValues(loss=surprise, distillation=surprise, bucket_kl=zeros)
        exact, larger = targets.exact, targets.in_larger_chunk
        chosen = StudentLogProbs(**{name: value[exact] for name, value in vars(student).items()})
        kept = targets.distributions()
        of_tokens = self.inner.distillation(chosen, kept, t=t)
        of_chunks = self._alm(surprise[larger], targets, larger)
        distillation = torch.zeros_like(surprise)
        distillation = distillation.masked_scatter(exact, self.one_to_one * of_tokens)
        distillation = distillation.masked_scatter(larger, self.chunks * of_chunks)
        share = self.cross_entropy_share
        loss = distillation if share == 0 else (1 - share) * distillation + share * surprise
        with torch.no_grad():
            kl = torch.zeros_like(surprise).masked_scatter(exact, chosen.buckets(kept).kl())
            if student.log_q.requires_grad:
                self.counts.add_values(of_tokens.sum(), of_chunks.sum())
            return LossValues(loss=loss, distillation=distillation, bucket_kl=kl)

    def _alm(self, surprise: torch.Tensor, targets: AlignedTargets, larger: torch.Tensor) -> torch.Tensor:
        """The share of each token in larger chunks, `[tokens]`."""
        _, chunk, sizes = targets.chunk[larger].unique_consecutive(return_inverse=True, return_counts=True)
        if not len(sizes):
            return surprise
        first = sizes.cumsum(0) - sizes
        of_student = torch.segment_reduce(surprise, "sum", lengths=sizes, unsafe=True)
        of_teacher = -targets.chunk_logprob[larger][first].to(surprise.dtype)
        return (alm(of_teacher, of_student, self.temperature) / sizes)[chunk]


def alm(of_teacher: torch.Tensor, of_student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Value `[C]` of chunks with surprises `-log P [C]`, in nats: see the head of this file."""
    a = of_teacher.clamp_min(SMALLEST_SURPRISE) / temperature
    b = of_student.clamp_min(SMALLEST_SURPRISE) / temperature
    x, not_x = (-a).exp(), -torch.expm1(-a)
    log_not_y = torch.log(-torch.expm1(-b))
    return temperature * (x * (b - a) + not_x * (not_x.log() - log_not_y))
