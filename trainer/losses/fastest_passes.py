"""Which passes a device gets: logits come in, the plain passes or Triton's go out.

Triton's are taken on CUDA for float32, once they have agreed with the plain ones there. Whatever goes wrong on the way
(no Triton, no C compiler, a GPU it does not know, another result) is one line in the log, and the plain passes.
`COLDSTILL_TRITON=0` in the environment turns them off.
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from coldstill.trainer.targets import SparseTargets

from .row_passes import PlainPasses, RowGradient, RowPasses

SWITCH = "COLDSTILL_TRITON"
LARGEST_DIFFERENCE = 1e-4
"""Between two float32 results of the self-check: absolute below 1, relative above."""

log = logging.getLogger(__name__)


def fastest_passes(logits: torch.Tensor) -> RowPasses:
    """The passes for `logits`; the first call on a GPU compiles and checks, a few seconds."""
    if logits.is_cuda and logits.dtype == torch.float32 and os.environ.get(SWITCH, "1") != "0":
        return _checked(logits.device)
    return PlainPasses()


@functools.cache
def _checked(device: torch.device) -> RowPasses:
    try:
        from .triton_passes import TritonPasses

        passes = TritonPasses()
        if (found := difference(passes, device)) <= LARGEST_DIFFERENCE:
            return passes
        reason = f"they differ from the plain passes by {found:.1e}"
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    log.warning("losses on %s run without Triton: %s (%s=0 turns it off silently)", device, reason, SWITCH)
    return PlainPasses()


def difference(passes: RowPasses, device: torch.device, *, vocabulary: int = 20_011) -> float:
    """Largest difference between `passes` and the plain ones on random logits: pads, repeated draws, positions without
    draws, labels inside and outside the kept ids. Not a number where either gives one that is not."""
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
