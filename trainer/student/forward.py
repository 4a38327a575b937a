"""The distilling forward pass: a causal LM that is called with targets returns their loss.

    model(input_ids=..., targets=..., objective=..., t=..., weight=...) -> {"loss": scalar, "values": LossValues}
    model(input_ids=..., targets=...) -> {"hidden": [M, D]}, the head's input, or {"logits": [M, V]} without a formula

Shape letters: `B` rows, `T` tokens, `M` target positions, `D` width, `V` rows of the head.

It is an attribute of this one model object, set on the innermost `PreTrainedModel`. Wrappers of models (DDP, the
autocast of accelerate, peft) wrap it like any forward, so gradients are reduced and types are cast as usual. The class,
its `state_dict` and what `save_pretrained` writes stay plain. Called without targets it is the model's own forward, so
generation and evaluation are unaffected.

The fused loss computes the head itself, in chunks. Its input is what the model's own forward passes to its head, so
whatever a class does before the head is the class's own code. What it does after the head must be reproduced:
`find_head` reads that formula from the model's configuration and compares it with the model's own logits on a few
tokens, also with hidden states so large that a soft-capping would show. The formula holds per token, so a longer probe
would show no more.

A class may add terms to the loss of its labels: the auxiliary loss of a mixture of experts with `output_router_logits`.
The distilling loss adds the same terms, computed by the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel
from transformers.utils import logging

from coldstill.common.attention import evaluation_mode
from coldstill.common.errors import first_line
from coldstill.common.processor import type_input_of
from coldstill.trainer.errors import ExtraLossUnsupported
from coldstill.trainer.loss_kernels.fused_head import Head, Objective, loss_on_hidden, loss_on_logits
from coldstill.trainer.targets import SparseTargets

from .wrapper import LIBRARY_ERRORS, Wrapping, find_wrapping, tolerance

logger = logging.get_logger(__name__)

_STATE = "_distilling"

PROBE_TOKENS = 8
LARGE_LOGIT = 60.0
"""Twice the soft-capping of Gemma 2: capped logits then differ from plain ones by half."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Distilling:
    """How this model's loss is computed: from its own logits where `formula` is None, for the `reason` given.

    `adds_terms`: the class adds terms of its own to the loss of its labels. `wrapping`: what the wrapper of this model
    adds to its sequence.
    """

    token_count: int
    formula: HeadFormula | None
    reason: str
    adds_terms: bool
    wrapping: Wrapping


def distill_in_forward(model: torch.nn.Module, *, token_count: int, fused: bool = True) -> Distilling:
    """Set the distilling forward on `model`, or on the model inside it; a second call changes the settings.

    `token_count`: ids of the tokenizer; further rows of the head are ignored. With `fused` False the loss is computed
    from the model's own logits even if the head could be computed in chunks.

    Raises `ExtraLossUnsupported`, `WrapperUnsupported`.
    """
    inner = innermost(model)
    wrapping = find_wrapping(model, inner)
    formula, reason = find_head(inner) if fused else (None, "fused_head is False")
    adds_terms, of_logits = _find_terms(inner, formula)
    if of_logits:
        formula, reason = None, "its loss has a term of all logits"
    state = Distilling(token_count, formula, reason, adds_terms, wrapping)
    if not hasattr(inner, _STATE):
        # A bound method without a closure over the model: it survives deepcopy, and wrappers that rebind it.
        inner.forward = MethodType(_forward_of(type(inner)), inner)
    setattr(inner, _STATE, state)
    return state


def distilling_of(model: PreTrainedModel) -> Distilling:
    """The settings of the distilling forward of `model`, which `distill_in_forward` has set."""
    state: Distilling = getattr(model, _STATE)
    return state


def model_inputs(batch: Mapping[str, Any], model: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The arguments of a student's forward pass: token ids, what separates the rows, and the inputs of images.

    Padded rows need only the mask, so they also work with models that accept no `position_ids`. Packed rows are
    separated by their positions and have no mask.

    `model`: needed for a batch of a student that reads images. Pixels get the dtype of its weights. It is also told
    which tokens are patches, if its class takes that.
    """
    separator = "attention_mask" if "attention_mask" in batch else "position_ids"
    inputs = {"input_ids": batch["input_ids"], separator: batch[separator]}
    if "token_types" in batch and model is not None:
        inner = innermost(model)
        for name, value in batch["images"].items():
            inputs[name] = value.to(inner.dtype) if value.is_floating_point() else value
        if (types := type_input_of(type(inner).forward)) is not None:
            inputs[types] = batch["token_types"]
    return inputs


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
        state = distilling_of(self)
        position = targets.position + state.wrapping.added
        # peft passes arguments it was not given as None.
        given = {name: value for name, value in inputs.items() if value is not None}
        given["use_cache"] = False
        if state.adds_terms:
            given["labels"] = targets.row  # Any tensor: `_only_terms` does not read it.
        with _only_terms(self) if state.adds_terms else nullcontext():
            if state.formula is None:
                output = plain(self, *args, **given)
            else:
                hidden, output = before_head(self, *args, **given)
        if state.formula is None:
            logits = output.logits[targets.row, position, : state.token_count]
            if objective is None:
                return {"logits": logits}
            loss, values = loss_on_logits(logits, targets, objective, t=t, weight=weight)
        else:
            hidden = hidden[targets.row, position]
            if objective is None:
                return {"hidden": hidden}
            if state.formula.scale != 1:
                hidden = hidden * state.formula.scale
            head = state.formula.head(self, token_count=state.token_count)
            loss, values = loss_on_hidden(hidden, head, targets, objective, t=t, weight=weight)
        if state.adds_terms:
            # A micro-batch counts as its share of the targets, so a step takes the mean of its micro-batches.
            loss = loss + weight * targets.count * output.loss
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
        embeddings = head_of(model)
        return Head(weight=embeddings.weight, bias=embeddings.bias, token_count=token_count, softcap=self.softcap)

    def logits(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """`[B, T, V]` of `hidden [B, T, D]`, the plain way."""
        embeddings = head_of(model)
        logits = torch.nn.functional.linear(self.scale * hidden, embeddings.weight, embeddings.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: PreTrainedModel) -> tuple[HeadFormula | None, str]:
    """The formula of the head, checked by a probe; or None and the reason why the model's own logits are used."""
    embeddings = head_of(model)
    if isinstance(embeddings, BaseTunerLayer):
        return None, "its head has an adapter, so its weight alone does not give the logits"
    if type(embeddings) is not torch.nn.Linear:
        return None, f"its head is a {type(embeddings).__module__}.{type(embeddings).__name__}, not torch's Linear"
    config = model.config.get_text_config(decoder=True)
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    # Some classes apply their scale before the head, such as MiniCPM: then the head's input has it.
    for scale in dict.fromkeys((_scale(config), 1.0)):
        formula = HeadFormula(scale=scale, softcap=softcap)
        if _agrees(model, formula):
            return formula, ""
    return None, "its logits are not those of its last hidden states and its head alone"


def head_of(model: PreTrainedModel) -> Any:
    """The module that computes the logits. peft wraps a copy of the head that `modules_to_save` names."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        return head.modules_to_save[active[0]] if active and not head.disable_adapters else head.original_module
    return head


def _scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0


# Only this frame is kept out of torch.compile: it changes attributes of modules. The model's forward is compiled.
@torch.compiler.disable(recursive=False)
def before_head(model: PreTrainedModel, *args: Any, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """What the model's own forward passes to its head, `[B, T, D]`, and its output, whose logits `[B, 1, V]` are 0."""
    hidden: list[torch.Tensor] = []
    head = head_of(model)

    def keep(given: torch.Tensor) -> torch.Tensor:
        hidden.append(given)
        return given.new_zeros(given.shape[0], 1, head.weight.shape[0])

    before = vars(head).get("forward")
    head.forward = keep
    try:
        output = type(model).forward(model, *args, **inputs)
    finally:
        del head.forward
        if before is not None:
            head.forward = before
    if len(hidden) != 1:
        raise ValueError(f"{type(model).__name__} calls its head {len(hidden)} times")
    return hidden[0], output


@contextmanager
def _hooked_head(model: PreTrainedModel, hook: Any) -> Iterator[None]:
    handle = head_of(model).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _agrees(model: PreTrainedModel, formula: HeadFormula) -> bool:
    """Whether the formula gives the model's own logits, at their own size and at a large one."""
    inputs = {"input_ids": _probe_tokens(model), "use_cache": False, "return_dict": True}
    factor, hidden = 1.0, torch.empty(0)

    def stretch(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal hidden
        hidden = given[0] * factor
        return (hidden, *given[1:])

    with evaluation_mode(model):
        try:
            for _ in range(2):
                with _hooked_head(model, stretch):
                    found = type(model).forward(model, **inputs).logits
                wanted = formula.logits(model, hidden)
                if not _are_equal(found, wanted):
                    return False
                if factor == 1 and not _are_equal(before_head(model, **inputs)[0], hidden):
                    return False
                factor = LARGE_LOGIT / max(float(wanted.abs().max()), 1e-6)
        except LIBRARY_ERRORS:
            return False
    return True


def _are_equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= tolerance(wanted.dtype) * float(wanted.abs().max()))


@torch.no_grad()
def _find_terms(model: PreTrainedModel, formula: HeadFormula | None) -> tuple[bool, bool]:
    """Whether the class adds terms to the loss of its labels, and whether they depend on all logits.

    Raises `ExtraLossUnsupported` if the class computes a requested auxiliary loss without its loss function.
    """
    tokens = _probe_tokens(model)
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False, "return_dict": True}
    terms, of_one, auxiliary, failure = 0.0, 0.0, None, ""
    with evaluation_mode(model), _only_terms(model) as calls:
        try:
            output = type(model).forward(model, **inputs)
            auxiliary = getattr(output, "aux_loss", None)
            if not calls:
                raise ValueError("the class does not call its loss_function")
            terms = of_one = float(output.loss)
            if terms and formula is not None:
                of_one = float(before_head(model, **inputs)[1].loss)
        except LIBRARY_ERRORS as error:
            failure = first_line(error)
    requested = getattr(model.config.get_text_config(decoder=True), "output_router_logits", False)
    if requested and failure and auxiliary is not None:
        raise ExtraLossUnsupported(
            f"auxiliary loss of a {type(model).__name__}",
            found=failure,
            wanted="a class that adds it to the value of its loss_function",
            fix="set output_router_logits to false in the student's config.json, to train without this loss",
        )
    if requested and auxiliary is None:
        logger.warning(
            f"output_router_logits is true, but the class {type(model).__name__} computes no auxiliary loss: "
            f"the student trains without one" + (f" ({failure})" if failure else "")
        )
    return terms != 0, not abs(terms - of_one) <= tolerance(torch.float32) * abs(terms)


@contextmanager
def _only_terms(model: PreTrainedModel) -> Iterator[list[None]]:
    """The loss function of the class is 0 in this context, so the loss for labels is the terms that it adds.

    Yields a list with one item per call of the loss function.
    """
    calls: list[None] = []

    def nothing(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(None)
        return torch.zeros((), device=logits.device)

    before = vars(model).get("_loss_function")
    model.loss_function = nothing
    try:
        yield calls
    finally:
        del model._loss_function
        if before is not None:
            model.loss_function = before


def _probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    return torch.arange(PROBE_TOKENS, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
