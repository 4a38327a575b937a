"""Plain fine-tuning on the rows' own tokens: logits and labels come in, one cross-entropy per position goes out."""

from __future__ import annotations

import torch

from trainer.targets import SparseTargets

from .protocol import LossValues
from .taid import taid_loss


def cross_entropy_loss(logits: torch.Tensor, targets: SparseTargets, *, t: float = 0.0) -> LossValues:
    """`-log q(label)` of `logits [M, V]`, in float32 at least; `t` is not looked at.

    The teacher gives no gradient here. It is only measured against (`bucket_kl`), so that the curves of all losses
    can be laid over one another; that costs one more pass over the logits, without a gradient.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(wide, targets.labels, reduction="none")
    measured = taid_loss(logits.detach(), targets, t=1.0, tail="bucket")
    return LossValues(loss=loss, distillation=loss.detach(), bucket_kl=measured.bucket_kl)
