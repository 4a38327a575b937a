"""How a student's hidden states become its logits: a model comes in, a proved `HeadFormula` or the reason against it
goes out.

Shape letters: `B` rows, `T` tokens, `D` width, `V` rows of the head.

The fused loss computes the head itself, chunk by chunk, so it must know what the model's own forward does after its
last layer. Nothing is believed: the formula is read from the model's configuration and then tried against the model's
own logits, on a few tokens, also with hidden states so large that a soft-capping would show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from coldstill.trainer.losses.fused_head import Head

PROBE_TOKENS = 8
LARGE_LOGIT = 60.0
"""Twice the soft-capping of Gemma 2: capped logits then differ from plain ones by half."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Of the largest logit; 3e-2 for the 16-bit types."""


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
    """The formula of the head, proved by a probe; or None and why the loss must take the model's own logits."""
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
    """Whether the formula gives the model's own logits, as they are and with hidden states that make them large."""
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
