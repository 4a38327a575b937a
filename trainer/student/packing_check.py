"""Checks that a student keeps the rows of a pack separate, before the first optimizer step.

Only position ids mark where a row of a pack begins: they restart at 0. Most models of transformers build their
attention mask from them. A recurrent model, or one that computes its own positions, would let a row attend to the row
before it without any error. A model with chunked attention may cut its chunks in the pack and not in the row. So a
forward pass tests it, on packs as long as those of the training: no window or chunk can be too long for it to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from coldstill.common.attention import can_widen, evaluation_mode, float32_weights
from coldstill.common.errors import first_line
from coldstill.trainer.errors import PackingUnsupported

from .forward import HeadFormula, before_head, head_of
from .positions import context_of, table_length
from .wrapper import LIBRARY_ERRORS

SHORT_LENGTHS = (5, 3, 5, 4)
"""Tokens of the short test rows: of unequal length, and more than two, so that the last row has several neighbors. The
rest of the pack is one long row before the last, or several where the student's positions are fewer. It begins at token
13, a prime: at a multiple of a chunk's length, its chunks in the pack would be those of the row alone."""
TOLERANCE = {torch.float32: 3e-5, torch.float64: 3e-10}
"""Largest allowed difference at a token, the root mean square over the vocabulary, as a share of the largest logit. A
student of 16 bits computes in float32 here, because its rounding grows with its depth: packs of a real Gemma 3 270M
differ by 4.9% in bfloat16. Where that is not possible, as with flash attention, 2e-2 and `ROUNDINGS` times the
difference between a row alone and in a batch. Rounding causes 1e-6. A row that attends to its neighbor differs by the
spread of the logits: 1e-3 and more, also with random weights. Unlike the largest difference of all, a mean over the
vocabulary does not grow with the number of tokens."""
ROUNDINGS = 8
_CHUNK = 256
"""Tokens whose logits are compared at once."""


@torch.no_grad()
def check_packing(
    model: PreTrainedModel, *, batch_size: int, pack_length: int, formula: HeadFormula | None = None
) -> None:
    """Raise `PackingUnsupported` unless rows have the same logits in packs, two at once or one, as alone.

    `formula`: that of the training; None compares the logits of the model's own forward.
    """
    lengths = row_lengths(pack_length, longest=table_length(model) or context_of(model.config) or pack_length)
    ids = torch.arange(sum(lengths), device=model.device) % model.get_input_embeddings().weight.shape[0]
    rows = ids.split(lengths)
    positions = [torch.arange(length, device=model.device) for length in lengths]
    differences, rounding = [], 0.0
    is_narrow = _computes_in_16_bits(model)
    widens = is_narrow and can_widen(model) and "flash" not in str(model.config._attn_implementation)
    try:
        with evaluation_mode(model), _in_float32(model) if widens else nullcontext():
            if is_narrow and not widens:
                twice = _outputs(model, formula, rows[0].repeat(2, 1))[0]
                rounding = _difference(model, formula, twice, _outputs(model, formula, rows[0][None])[0])
            separate = [_outputs(model, formula, row[None])[0] for row in rows]
            # Also in reverse: a chunk that ends where a row ends in the one order ends inside a row in the other.
            packs = [
                (torch.cat(rows[::step]), torch.cat(positions[::step]), torch.cat(separate[::step])) for step in (1, -1)
            ]
            for batch in [packs] if batch_size > 1 else [packs[:1], packs[1:]]:
                tokens, places, alone = map(torch.stack, zip(*batch, strict=True))
                packed = _outputs(model, formula, tokens, position_ids=places)
                differences += [_difference(model, formula, *pair) for pair in zip(packed, alone, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except LIBRARY_ERRORS as error:
        raise _unsupported(model, first_line(error)) from error
    off = float(torch.tensor(differences).max())  # NaN if one is NaN
    if not off <= TOLERANCE.get(packed.dtype, 2e-2) + ROUNDINGS * rounding:
        raise _unsupported(model, f"logits of packed rows differ by {off:.1%} of the largest logit")


def _computes_in_16_bits(model: PreTrainedModel) -> bool:
    narrow = any(weight.is_floating_point() and weight.element_size() < 4 for weight in model.parameters())
    return narrow or torch.is_autocast_enabled(model.device.type)


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Each module computes in float32 in this context, and the head's weight is float32 for the formula too."""
    weight = head_of(model).weight
    narrow = weight.data
    with torch.autocast(model.device.type, enabled=False), float32_weights(model):
        weight.data = narrow.float()
        try:
            yield
        finally:
            weight.data = narrow


def row_lengths(pack_length: int, *, longest: int) -> tuple[int, ...]:
    """Tokens of the rows of a test pack: those of `SHORT_LENGTHS`, and rows of at most `longest` that fill the pack."""
    *before, last = SHORT_LENGTHS
    rest = pack_length - sum(SHORT_LENGTHS)
    filled = [longest] * (max(rest, 0) // longest) + ([rest % longest] if rest > 0 and rest % longest else [])
    return (*before, *filled, last)


def _outputs(
    model: PreTrainedModel, formula: HeadFormula | None, tokens: torch.Tensor, **inputs: torch.Tensor
) -> torch.Tensor:
    """The input of the head, `[B, T, D]`, which takes less memory than the logits; without a formula these."""
    if formula is None:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **inputs).logits
        return logits
    return before_head(model, input_ids=tokens, use_cache=False, **inputs)[0]


def _difference(
    model: PreTrainedModel, formula: HeadFormula | None, packed: torch.Tensor, separate: torch.Tensor
) -> float:
    off, largest = [torch.zeros(())], [torch.full((), 1e-30)]
    for ours, theirs in zip(packed.split(_CHUNK), separate.split(_CHUNK), strict=True):
        if formula is not None:
            ours, theirs = formula.logits(model, ours), formula.logits(model, theirs)
        off.append((ours - theirs).double().square().mean(-1).sqrt().max().cpu())
        largest.append(theirs.abs().max().cpu())
    return float(torch.stack([it.double() for it in off]).max() / torch.stack([it.double() for it in largest]).max())


def _unsupported(model: PreTrainedModel, found: str) -> PackingUnsupported:
    chunk = getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None)
    shorter = f"or to at most {chunk}, its attention_chunk_size, " if chunk else ""
    return PackingUnsupported(
        f"packing with a {type(model).__name__}, attention {model.config._attn_implementation}",
        found=found,
        wanted="the logits that each row has on its own: no attention across the rows of a pack",
        fix=f"set pack_length to null {shorter}or batch_size to 1, or set another student.attention",
    )
