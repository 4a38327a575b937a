"""What a model says at target positions: a model and a batch come in, its logits there go out, a part at a time.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `D` width, `V` ids of the tokenizer.

Logits `[M, V]` of one long batch are gigabytes. So the hidden states `[M, D]` of the target positions are kept, and the
head is applied to a part of them when it is asked for. A head that `find_head` does not understand is left
to the model: then its own logits `[B, T, V]` exist once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from coldstill.trainer.student import innermost
from coldstill.trainer.student.forward import find_head
from coldstill.trainer.targets import SparseTargets

Part = Callable[[int, int], torch.Tensor]
"""`part(start, stop)` gives `[stop - start, V]` logits, in the dtype of the model's own; not to be written to."""

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class LogitReader:
    """Reads one model. It must stay in evaluation mode meanwhile: what its head computes is tried out once."""

    def __init__(self, model: torch.nn.Module, *, token_count: int):
        """`model`: a causal language model of transformers, or what wraps one. Columns of its head from `token_count`
        on are left out."""
        self.token_count = token_count
        self._model = innermost(model)
        self._formula, _ = find_head(self._model)

    @property
    def device(self) -> torch.device:
        """Where the model's logits will be."""
        return self._model.device

    def read(self, batch: Mapping[str, Any], targets: SparseTargets) -> Part:
        """The logits of `batch` at `targets`, which may lie on any device. The forward pass happens here."""
        inputs = {name: batch[name].to(self.device) for name in _MODEL_INPUTS if name in batch}
        row, position = targets.row.to(self.device), targets.position.to(self.device)
        if self._formula is None:
            logits = self._model(**inputs, use_cache=False).logits[row, position, : self.token_count]
            return lambda start, stop: logits[start:stop]
        hidden = self._model.base_model(**inputs, use_cache=False)[0][row, position]
        model, formula = self._model, self._formula
        return lambda start, stop: formula.logits(model, hidden[start:stop])[:, : self.token_count]
