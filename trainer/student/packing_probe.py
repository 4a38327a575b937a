"""Whether a student keeps packed rows apart: a model comes in; silence, or a named error before a step is taken.

A pack is told apart by its position ids alone, which start again at 0 with each row. Most models of transformers build
their attention mask from them; a recurrent model, or one that makes its own positions, would let a row see the one
before it, and nothing would fail: so it is tried.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from coldstill.trainer.errors import PackingUnsupported

LENGTHS = (5, 3, 4)
"""Tokens of the probe's rows: unequal, and more than two, so that the last one has neighbours to see."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Of the largest logit; 5e-2 for the 16-bit types. Rounding is off by 1e-6, a row that sees its neighbour by as much as
logits vary: 1e-3 and more in a student whose weights are still random."""


@torch.no_grad()
def check_packing(model: PreTrainedModel, *, batch_size: int) -> None:
    """Raise `PackingUnsupported` unless `batch_size` packs of rows give the logits of the rows apart."""
    ids = torch.arange(sum(LENGTHS), device=model.device) % model.get_input_embeddings().weight.shape[0]
    rows = ids.split(LENGTHS)
    positions = torch.cat([torch.arange(length, device=model.device) for length in LENGTHS])
    packs = min(batch_size, 2)
    was_training = model.training
    try:
        model.eval()
        apart = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        together = model(
            input_ids=ids.repeat(packs, 1), position_ids=positions.repeat(packs, 1), use_cache=False
        ).logits
        off = float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-30))
    except (TypeError, ValueError) as error:
        raise _unsupported(model, str(error).strip().splitlines()[0]) from error
    finally:
        model.train(was_training)
    if not off <= TOLERANCE.get(apart.dtype, 5e-2):
        raise _unsupported(model, f"logits of packed rows are off by {off:.1%} of the largest")


def _unsupported(model: PreTrainedModel, found: str) -> PackingUnsupported:
    return PackingUnsupported(
        f"packing with a {type(model).__name__}, attention {model.config._attn_implementation}",
        found=found,
        wanted="the logits that each row has alone: no attention across the rows of a pack",
        fix="set pack_length to null, or batch_size to 1, or choose another student.attention",
    )
