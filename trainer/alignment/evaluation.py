"""Measures a student with another tokenizer than the dataset's on its own tokens of the rows.

Shape letters: `M` target positions of a batch, `V` ids of the student's tokenizer.

Distributions over two vocabularies have no divergence, so the figures are those of the text: a byte is the same for
both models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from coldstill.trainer.errors import NoTargets
from coldstill.trainer.evaluation.measured_model import LogitReader, measuring

from .targets import AlignedTargets

CHUNK_BYTES = 128 << 20
"""Size of one float32 array `[positions, V]`; about two exist at once."""
RANKING = ("loss", "cross_entropy", "accuracy")
"""Figures that may select the best checkpoint."""


def evaluate_text(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    token_count: int,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Figures of the text over all target positions of `batches`, in evaluation mode and without gradients.

    `cross_entropy`, which is also the `loss`, and `accuracy` are means over the student's target tokens.
    `bits_per_byte` is the cross-entropy of tokens of text over their bytes, in bits. `reduce` sums a float64 tensor
    over processes. Raises `NoTargets`.
    """
    sums = torch.zeros(8, dtype=torch.float64)
    with measuring(model):
        reader = LogitReader(model, token_count=token_count)
        size = max(1, CHUNK_BYTES // (4 * token_count))
        for batch in batches:
            targets: AlignedTargets = batch["targets"].to(reader.device)
            one, larger = targets.exact.sum().item(), targets.in_larger_chunk.sum().item()
            sums[4:] += torch.tensor([targets.count, one, larger, len(batch["skipped"])], dtype=torch.float64)
            if not targets.count:
                continue
            logits_of = reader.read(batch, targets)
            for start in range(0, targets.count, size):
                part, logits = targets.part(start, start + size), logits_of(start, start + size).float()
                of_label = logits.gather(1, part.labels[:, None])[:, 0]
                surprise = (logits.logsumexp(1) - of_label).double()
                is_text = part.byte_counts > 0
                found = (
                    surprise.sum(),
                    (logits.argmax(1) == part.labels).sum(),
                    surprise[is_text].sum(),
                    part.byte_counts.sum(),
                )
                sums[:4] += torch.stack([one.double().cpu() for one in found])
        device = reader.device
    if reduce is not None:
        sums = reduce(sums.to(device)).cpu()
    surprise_sum, correct, of_text, byte_count, count, one_to_one, in_larger, skipped = sums.tolist()
    if not count:
        raise NoTargets("evaluation", found="no target position in any batch", wanted="at least one")
    return {
        "loss": surprise_sum / count,
        "cross_entropy": surprise_sum / count,
        "bits_per_byte": of_text / max(1, byte_count) / math.log(2),
        "accuracy": correct / count,
        "share_one_to_one": one_to_one / count,
        "share_in_larger_chunks": in_larger / count,
        "share_lost": 1 - (one_to_one + in_larger) / count,
        "skipped_rows": skipped,
    }
