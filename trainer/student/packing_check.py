"""Checks that a student keeps the rows of a pack separate, before the first optimizer step.

Only position ids mark where a row of a pack begins: they restart at 0. Most models of transformers build their
attention mask from them. A recurrent model, or one that computes its own positions, would let a row attend to the row
before it without any error, so a forward pass tests it.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from coldstill.common.errors import first_line
from coldstill.trainer.errors import PackingUnsupported

LENGTHS = (5, 3, 4)
"""Tokens of the test rows: of unequal length, and more than two, so that the last row has several neighbors."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest allowed difference as a share of the largest logit; 5e-2 for the 16-bit dtypes. Rounding causes 1e-6. A row
that attends to its neighbor differs by the spread of the logits: 1e-3 and more, also with random weights."""


@torch.no_grad()
def check_packing(model: PreTrainedModel, *, batch_size: int) -> None:
    """Raise `PackingUnsupported` unless rows have the same logits in `batch_size` packs, at most two, as alone."""
    ids = torch.arange(sum(LENGTHS), device=model.device) % model.get_input_embeddings().weight.shape[0]
    rows = ids.split(LENGTHS)
    positions = torch.cat([torch.arange(length, device=model.device) for length in LENGTHS])
    packs = min(batch_size, 2)
    was_training = model.training
    try:
        model.eval()
        separate = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        packed = model(input_ids=ids.repeat(packs, 1), position_ids=positions.repeat(packs, 1), use_cache=False).logits
        off = float((packed - separate).abs().max() / separate.abs().max().clamp_min(1e-30))
    except (TypeError, ValueError) as error:
        raise _unsupported(model, first_line(error)) from error
    finally:
        model.train(was_training)
    if not off <= TOLERANCE.get(separate.dtype, 5e-2):
        raise _unsupported(model, f"logits of packed rows differ by {off:.1%} of the largest logit")


def _unsupported(model: PreTrainedModel, found: str) -> PackingUnsupported:
    return PackingUnsupported(
        f"packing with a {type(model).__name__}, attention {model.config._attn_implementation}",
        found=found,
        wanted="the logits that each row has on its own: no attention across the rows of a pack",
        fix="set pack_length to null or batch_size to 1, or set another student.attention",
    )
