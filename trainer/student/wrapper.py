"""Finds by a probe what a wrapper of a causal LM does to the sequence, such as peft's prompt learning.

Prompt tuning puts virtual tokens before the row, so the model inside computes more positions than the row has. Prefix
tuning passes keys and values to it. Adapters inside the layers change neither. Which of these a wrapper does is read
from its logits, so it also holds for wrappers that nobody here knows.

Shape letters: `N` tokens of a probe row, `L` positions of the wrapper's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from coldstill.common.attention import evaluation_mode
from coldstill.common.errors import first_line
from coldstill.trainer.errors import PackingUnsupported, WrapperUnsupported

LENGTHS = (4, 7)
"""N of the two probes: an offset that depends on the length shows."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
LIBRARY_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What a class of transformers may raise for arguments that it does not expect."""
_PARALLEL = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)


@dataclass(frozen=True)
class Wrapping:
    """`added`: positions of the logits before those of the row. `transparent`: the logits are those of the model
    inside, called with the same arguments."""

    added: int = 0
    transparent: bool = True


def find_wrapping(model: torch.nn.Module, inner: PreTrainedModel) -> Wrapping:
    """What `model` adds around the causal LM `inner` in it.

    Raises `WrapperUnsupported` if it cannot be called with token ids and a mask alone, or if its logits at a fixed
    offset do not belong to the tokens of the row.
    """
    outer = without_parallel(model)
    if outer is inner:
        return Wrapping()
    with torch.no_grad(), evaluation_mode(outer):
        try:
            probes = [_probe(outer, inner, length) for length in LENGTHS]
        except torch.OutOfMemoryError:
            raise
        except LIBRARY_ERRORS as error:
            raise _unsupported(outer, first_line(error)) from error
    offsets = {offset for found, _ in probes for offset in found}
    if len(offsets) != 1 or (added := offsets.pop()) is None or added < 0:
        raise _unsupported(outer, "logits whose positions do not follow from those of the tokens by one offset")
    return Wrapping(added, all(equal for _, equal in probes))


def check_wrapping(model: torch.nn.Module, wrapping: Wrapping, *, packs: bool, recomputes: bool) -> None:
    """Raise if rows cannot be packed, or activations not recomputed, with what the wrapper does.

    `packs`: rows are packed; `recomputes`: gradient checkpointing is on, which drops the keys and values that a wrapper
    passes. Raises `PackingUnsupported`, `WrapperUnsupported`.
    """
    if wrapping.transparent:
        return
    if packs:
        raise PackingUnsupported(
            f"packing with a {_name(model)}",
            found="a wrapper that adds virtual tokens once per pack",
            wanted="the same virtual tokens before each row",
            fix="set pack_length to null",
        )
    if recomputes and not wrapping.added:
        raise WrapperUnsupported(
            f"gradient checkpointing with a {_name(model)}",
            found="a wrapper that changes the logits and adds no position: it passes keys and values",
            wanted="keys and values that reach the layers; gradient checkpointing removes them",
            fix="set gradient_checkpointing=False",
        )


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference between equal logits of a probe, as a share of the largest logit."""
    return TOLERANCE.get(dtype, 3e-2)


def without_parallel(model: Any) -> Any:
    """The model inside torch's wrappers for several devices, which change no value."""
    while isinstance(model, _PARALLEL):
        model = model.module
    return model


def _probe(outer: Any, inner: PreTrainedModel, length: int) -> tuple[list[int | None], bool]:
    """The offset that each token of a row of `length` tokens shows, and whether the logits are those of `inner`.

    The logits of a causal model change from the position of a changed token on.
    """
    rows = inner.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(length, device=inner.device).repeat(length + 1, 1)
    tokens[:length] += length * torch.eye(length, dtype=tokens.dtype, device=tokens.device)
    inputs = {"input_ids": tokens % rows, "attention_mask": torch.ones_like(tokens)}
    logits = outer(**inputs).logits.double()
    own = inner(**inputs).logits.double()
    equal = logits.shape == own.shape and bool((logits - own).abs().max() <= tolerance(inner.dtype) * own.abs().max())
    changes = (logits[:-1] - logits[-1]).abs().amax(-1)
    return [_first(change, token) for token, change in enumerate(changes)], equal


def _first(change: torch.Tensor, token: int) -> int | None:
    """Offset between `token` and the first position of `change [L]` that is more than rounding; None if none is."""
    largest = change.max()
    return int((change > largest / 16).nonzero()[0]) - token if largest > 0 else None


def _name(model: Any) -> str:
    config = getattr(without_parallel(model), "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    return type(model).__name__ + (f" ({kind})" if kind else "")


def _unsupported(model: Any, found: str) -> WrapperUnsupported:
    return WrapperUnsupported(
        f"wrapper {_name(model)} of the student",
        found=found,
        wanted="a wrapper that is called with token ids and a mask, with one logit per token, after the same number of "
        "added positions in each row",
        fix="train adapters inside the layers, such as LoRA, or prompt tuning with one task",
    )
