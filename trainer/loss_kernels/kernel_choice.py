"""Whether this GPU may use the Triton passes: they must agree with the plain ones on random logits first.

Any failure on the way (no Triton, no C compiler, an unknown GPU, a different result) is one warning in the log, and the
plain passes are used. `COLDSTILL_TRITON=0` in the environment turns Triton off without a warning.
"""

from __future__ import annotations

import functools
import logging

import torch

from coldstill.common.errors import first_line
from coldstill.trainer.targets import SparseTargets

from .logit_view import TRITON_SWITCH, PlainPasses, RowGradient, RowPasses

LARGEST_DIFFERENCE = 1e-4
"""Between two float32 results of the self-check: absolute below 1, relative above."""

log = logging.getLogger(__name__)


@functools.cache
def checked_passes(device: torch.device) -> RowPasses:
    """Triton's passes where they are correct on `device`, else the plain ones."""
    try:
        from .triton_passes import TritonPasses

        passes = TritonPasses()
        if (found := difference(passes, device)) <= LARGEST_DIFFERENCE:
            return passes
        reason = f"they differ from the plain passes by {found:.1e}"
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    log.warning("losses on %s run without Triton: %s (%s=0 turns it off silently)", device, reason, TRITON_SWITCH)
    return PlainPasses()


def difference(passes: RowPasses, device: torch.device, *, vocabulary: int = 20_011) -> float:
    """Largest difference between `passes` and the plain ones on random logits; NaN where either result has a NaN.

    The logits cover padding, repeated draws, positions without draws, labels inside and outside the kept ids."""
    positions, top_k, most_draws = 8, 6, 5
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(positions, vocabulary, generator=random)
    ids = torch.rand(positions, vocabulary, generator=random).topk(top_k).indices
    logprobs = torch.full((positions, top_k), -3.0)
    ids[3, 4:], logprobs[3, 4:] = ids[3, 0], -torch.inf
    drawn = torch.arange(most_draws) < torch.tensor([0, 1, 2, 3, 4, 5, 5, 0])[:, None]
    draws = torch.randint(vocabulary, (positions, most_draws), generator=random) * drawn
    draws[5] = draws[5, 0]
    row = torch.arange(positions)
    targets = SparseTargets(
        ids=ids,
        logprobs=logprobs,
        log_tail=torch.full((positions,), -1.0),
        labels=torch.where(row % 2 == 0, ids[:, 0], draws[:, 0]),
        label_logprob=torch.full((positions,), -1.0),
        draws=draws,
        draw_weights=drawn / drawn.sum(1, keepdim=True).clamp_min(1),
        draw_logprobs=None,
        row=row,
        position=row,
    ).to(device)
    gradient = RowGradient(
        of_tail=torch.randn(positions, generator=random).to(device),
        at_kept=torch.randn(positions, top_k, generator=random).to(device) * targets.kept,
        at_draws=torch.randn(positions, most_draws, generator=random).to(device) * (targets.draw_weights > 0),
        at_label=torch.randn(positions, generator=random).to(device),
    )
    sides = []
    for side in (passes, PlainPasses()):
        memory = logits.to(device, copy=True)
        read = side.read_(memory, targets)
        sides.append([*vars(read).values(), side.write_(memory, targets, read, gradient)])
    gaps = [((one - other).abs() / (1 + other.abs())).max() for one, other in zip(*sides, strict=True)]
    return float(torch.stack(gaps).max())
