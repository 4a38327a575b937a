"""The distilling forward: a causal LM comes in, and can from then on be called with targets to give their loss.

    model(input_ids=..., targets=..., objective=..., t=..., weight=...) -> {"loss": scalar, "values": LossValues}

Shape letters: `B` rows, `T` tokens, `M` target positions, `D` width, `V` rows of the head.

It is an attribute of this one model object, put on the innermost `PreTrainedModel`: whatever wraps models (DDP, the
autocast of accelerate, peft) wraps it as it wraps any forward, so gradients are reduced and types are cast as usual.
The class, its `state_dict` and what `save_pretrained` writes stay plain. Called without targets it is the model's own
forward: generation and evaluation do not notice.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from coldstill.trainer.losses import Objective
from coldstill.trainer.losses.fused_head import loss_on_hidden
from coldstill.trainer.losses.on_logits import loss_on_logits
from coldstill.trainer.targets import SparseTargets

from .head import HeadFormula, find_head

_STATE = "_distilling"


@dataclass(frozen=True)
class Distilling:
    """How this model's loss is computed: `formula` None means from its own logits, for the `reason` given."""

    token_count: int
    formula: HeadFormula | None
    reason: str


def distil_in_forward(model: torch.nn.Module, *, token_count: int, fused: bool = True) -> Distilling:
    """Put the distilling forward on `model`, or on the model within it; again with other settings is allowed.

    `token_count`: ids of the tokenizer; further rows of the head are left out. With `fused` False the loss is taken
    from the model's own logits even where it could be computed with the head in chunks.
    """
    inner = innermost(model)
    formula, reason = find_head(inner) if fused else (None, "it was asked for")
    state = Distilling(token_count, formula, reason)
    if not hasattr(inner, _STATE):
        # A bound method with nothing in a closure: it survives deepcopy, and what rebinds it to the model.
        inner.forward = MethodType(_forward_of(type(inner)), inner)
    setattr(inner, _STATE, state)
    return state


def innermost(model: torch.nn.Module) -> PreTrainedModel:
    """The causal LM of transformers inside adapters and parallel wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.module
    return inner


def _forward_of(owner: type[PreTrainedModel]) -> Any:
    """The distilling forward of a class; generation reads its signature, which is that of the class's own."""
    plain = owner.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        targets: SparseTargets | None = None,
        objective: Objective | None = None,
        t: float = 1.0,
        weight: float = 1.0,
        **inputs: Any,
    ) -> Any:
        if targets is None:
            return plain(self, *args, **inputs)
        assert objective is not None
        state: Distilling = getattr(self, _STATE)
        # peft hands on what it was not given as None; bodies do not know labels.
        given = {name: value for name, value in inputs.items() if value is not None}
        given["use_cache"] = False
        if state.formula is None:
            logits = plain(self, *args, **given).logits[targets.row, targets.position, : state.token_count]
            loss, values = loss_on_logits(logits, targets, objective, t=t, weight=weight)
        else:
            hidden = self.base_model(*args, **given)[0][targets.row, targets.position]
            if state.formula.scale != 1:
                hidden = hidden * state.formula.scale
            head = state.formula.head(self, token_count=state.token_count)
            loss, values = loss_on_hidden(hidden, head, targets, objective, t=t, weight=weight)
        return {"loss": loss, "values": values}

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    return forward
