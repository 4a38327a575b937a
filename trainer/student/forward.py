"""The distilling forward pass: a causal LM that is called with targets returns their loss.

    model(input_ids=..., targets=..., objective=..., t=..., weight=...) -> {"loss": scalar, "values": LossValues}

Shape letters: `B` rows, `T` tokens, `M` target positions, `D` width, `V` rows of the head.

It is an attribute of this one model object, set on the innermost `PreTrainedModel`. Wrappers of models (DDP, the
autocast of accelerate, peft) wrap it like any forward, so gradients are reduced and types are cast as usual. The class,
its `state_dict` and what `save_pretrained` writes stay plain. Called without targets it is the model's own forward, so
generation and evaluation are unaffected.

The fused loss computes the head itself, in chunks, so it must reproduce what the model's own forward does after its
last layer. `find_head` reads that formula from the model's configuration and compares it with the model's own logits on
a few tokens, also with hidden states so large that a soft-capping would show.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from coldstill.trainer.loss_kernels.fused_head import Head, Objective, loss_on_hidden, loss_on_logits
from coldstill.trainer.targets import SparseTargets

_STATE = "_distilling"

PROBE_TOKENS = 8
LARGE_LOGIT = 60.0
"""Twice the soft-capping of Gemma 2: capped logits then differ from plain ones by half."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Tolerance as a share of the largest logit; 3e-2 for the 16-bit types."""


@dataclass(frozen=True)
class Distilling:
    """How this model's loss is computed: from its own logits where `formula` is None, for the `reason` given."""

    token_count: int
    formula: HeadFormula | None
    reason: str


def distill_in_forward(model: torch.nn.Module, *, token_count: int, fused: bool = True) -> Distilling:
    """Set the distilling forward on `model`, or on the model inside it; a second call changes the settings.

    `token_count`: ids of the tokenizer; further rows of the head are ignored. With `fused` False the loss is computed
    from the model's own logits even if the head could be computed in chunks.
    """
    inner = innermost(model)
    formula, reason = find_head(inner) if fused else (None, "fused_head is False")
    state = Distilling(token_count, formula, reason)
    if not hasattr(inner, _STATE):
        # A bound method without a closure over the model: it survives deepcopy, and wrappers that rebind it.
        inner.forward = MethodType(_forward_of(type(inner)), inner)
    setattr(inner, _STATE, state)
    return state


def model_inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of a student's forward pass: token ids, and what separates the rows.

    Padded rows need only the mask, so they also work with models that accept no `position_ids`. Packed rows are
    separated by their positions and have no mask.
    """
    separator = "attention_mask" if "attention_mask" in batch else "position_ids"
    return {"input_ids": batch["input_ids"], separator: batch[separator]}


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
        # peft passes arguments it was not given as None; model bodies take no labels.
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


@dataclass(frozen=True, kw_only=True)
class HeadFormula:
    """`logits = softcap(scale * hidden @ weight.T + bias)`, weight and bias those of the output embeddings.

    `softcap`: c in `c tanh(z / c)` (Gemma 2), None for none; `scale`: Cohere's `logit_scale`, or the inverse of
    Granite's `logits_scaling`.
    """

    scale: float = 1.0
    softcap: float | None = None

    def head(self, model: PreTrainedModel, *, token_count: int) -> Head:
        """The head's tensors as they are now; rows from `token_count` on are left out of the softmax."""
        embeddings = model.get_output_embeddings()
        return Head(weight=embeddings.weight, bias=embeddings.bias, token_count=token_count, softcap=self.softcap)

    def logits(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """`[B, T, V]` of `hidden [B, T, D]`, the plain way."""
        embeddings = model.get_output_embeddings()
        logits = torch.nn.functional.linear(self.scale * hidden, embeddings.weight, embeddings.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: PreTrainedModel) -> tuple[HeadFormula | None, str]:
    """The formula of the head, checked by a probe; or None and the reason why the model's own logits are used."""
    embeddings = model.get_output_embeddings()
    if type(embeddings) is not torch.nn.Linear:
        return None, f"its head is a {type(embeddings).__name__}, not a plain linear layer"
    if model.base_model is model:
        return None, "its body has no module of its own"
    formula = HeadFormula(scale=_scale(model.config), softcap=getattr(model.config, "final_logit_softcapping", None))
    if not _agrees(model, formula):
        return None, "its logits are not those of its last hidden states and its head alone"
    return formula, ""


def _scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0


@torch.no_grad()
def _agrees(model: PreTrainedModel, formula: HeadFormula) -> bool:
    """Whether the formula gives the model's own logits, at their own size and at a large one."""
    tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    factor, hidden = 1.0, torch.empty(0)

    def stretch(module: torch.nn.Module, args: Any, output: Any) -> Any:
        nonlocal hidden
        hidden = output["last_hidden_state"] * factor
        output["last_hidden_state"] = hidden
        return output

    was_training = model.training
    handle = model.base_model.register_forward_hook(stretch)
    try:
        model.eval()
        for _ in range(2):
            found = type(model).forward(model, input_ids=tokens, use_cache=False, return_dict=True).logits
            wanted = formula.logits(model, hidden)
            largest = wanted.abs().max()
            if found.shape != wanted.shape or not (found - wanted).abs().max() <= _tolerance(wanted.dtype) * largest:
                return False
            factor = LARGE_LOGIT / max(float(largest), 1e-6)
    except (TypeError, KeyError, AttributeError):
        return False
    finally:
        handle.remove()
        model.train(was_training)
    return True


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, 3e-2)
