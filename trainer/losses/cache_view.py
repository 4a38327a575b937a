"""The K+1 view: K kept ids and one symbol for all the rest, of teacher and student alike, the tail last.

Shape letters: `M` target positions, `K` teacher top-k.

An f-divergence over these symbols is a lower bound of the dense one (data processing inequality), and is the dense one,
value and gradient, against a teacher whose tail has the student's shape and its own mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from coldstill.trainer.targets import SparseTargets

from .protocol import StudentView
from .student_view import LOG_EMPTY_TAIL

ViewTail = Literal["bucket", "renormalise"]
"""`bucket`: the tail is a symbol. `renormalise`: there is none, and both distributions sum to 1 over the kept ids."""


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """`log_q [M, K+1]` of the student, `log_p [M, K+1]` of the teacher, natural logs; `used bool [M, K+1]`: entries
    that count. An entry that is not used is 0 in both: 0 * -inf is not a number."""

    log_q: torch.Tensor
    log_p: torch.Tensor
    used: torch.Tensor

    @classmethod
    def of(cls, view: StudentView, targets: SparseTargets, *, tail: ViewTail = "bucket") -> CacheView:
        """Both distributions, in the dtype of `view`. A teacher's tail of no mass is as empty as a student's."""
        used = torch.nn.functional.pad(targets.kept, (0, 1), value=True)
        log_tail = targets.log_tail.clamp_min(LOG_EMPTY_TAIL)
        log_p = torch.cat([targets.logprobs, log_tail[:, None]], 1).to(view.log_q.dtype)
        both = cls(
            log_q=torch.cat([view.log_q, view.log_q_tail[:, None]], 1), log_p=log_p.masked_fill(~used, 0), used=used
        )
        return both if tail == "bucket" else both.among(torch.nn.functional.pad(targets.kept, (0, 1), value=False))

    def among(self, used: torch.Tensor) -> CacheView:
        """Both distributions given that the symbol is one of `used bool [M, K+1]`; these must be used here."""
        return CacheView(
            log_q=self.log_q.masked_fill(~used, -torch.inf).log_softmax(1).masked_fill(~used, 0),
            log_p=self.log_p.masked_fill(~used, -torch.inf).log_softmax(1).masked_fill(~used, 0),
            used=used,
        )

    def log_softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """`[M, K+1]` log-probs of `scores [M, K+1]` over the used entries; -inf elsewhere."""
        return scores.masked_fill(~self.used, -torch.inf).log_softmax(1)

    def expect(self, probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`[M]` sums of `probs * values` over the used entries."""
        return (probs * values).masked_fill(~self.used, 0).sum(1)

    def kl(self) -> torch.Tensor:
        """`KL(teacher || student) [M]` over the symbols."""
        return self.expect(self.log_p.exp(), self.log_p - self.log_q)

    def reverse_kl(self) -> torch.Tensor:
        """`KL(student || teacher) [M]` over the symbols."""
        return self.expect(self.log_q.exp(), self.log_q - self.log_p)


def bucket_kl(view: StudentView, targets: SparseTargets) -> torch.Tensor:
    """`KL(teacher || student) [M]` over the K+1 symbols: a lower bound of the dense KL."""
    return CacheView.of(view, targets).kl()
