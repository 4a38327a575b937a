"""The K+1 view: K kept ids and one symbol for all the rest, of teacher and student alike, the tail last.

Shape letters: `M` target positions, `K` teacher top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.targets import SparseTargets

from .protocol import StudentView


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """`log_q [M, K+1]` of the student, `log_p [M, K+1]` of the teacher, natural logs; `used bool [M, K+1]`: entries
    that count. An entry that is not used is 0 in both: 0 * -inf is not a number."""

    log_q: torch.Tensor
    log_p: torch.Tensor
    used: torch.Tensor

    @classmethod
    def of(cls, view: StudentView, targets: SparseTargets) -> CacheView:
        """Both distributions, in the dtype of `view`."""
        used = torch.nn.functional.pad(targets.kept, (0, 1), value=True)
        log_p = torch.cat([targets.logprobs, targets.log_tail[:, None]], 1).to(view.log_q.dtype)
        return cls(
            log_q=torch.cat([view.log_q, view.log_q_tail[:, None]], 1), log_p=log_p.masked_fill(~used, 0), used=used
        )

    def log_softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """`[M, K+1]` log-probs of `scores [M, K+1]` over the used entries; -inf elsewhere."""
        return scores.masked_fill(~self.used, -torch.inf).log_softmax(1)

    def expect(self, probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`[M]` sums of `probs * values` over the used entries."""
        return (probs * values).masked_fill(~self.used, 0).sum(1)


def bucket_kl(view: StudentView, targets: SparseTargets) -> torch.Tensor:
    """`KL(teacher || student) [M]` over the K+1 symbols: a lower bound of the dense KL (data processing inequality)."""
    both = CacheView.of(view, targets)
    return both.expect(both.log_p.exp(), both.log_p - both.log_q)
