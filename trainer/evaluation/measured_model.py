"""The model being measured: loading it, evaluation mode, and its logits at target positions in parts.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `D` width, `V` ids of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from coldstill.common.attention import evaluation_mode
from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.loss_kernels.fused_head import logits_in_parts
from coldstill.trainer.student.forward import (
    HeadFormula,
    before_head,
    distilling_of,
    find_head,
    innermost,
    model_inputs,
)
from coldstill.trainer.student.load import check_attention
from coldstill.trainer.student.tokenizer import check_tokenizer, load_with_images, tokenizer_files
from coldstill.trainer.student.wrapper import find_wrapping, without_parallel
from coldstill.trainer.targets import SparseTargets

Weights = Literal["float32", "bfloat16"]
LogitsOfPart = Callable[[int, int], torch.Tensor]
"""`(start, stop) -> [stop - start, V]` logits: float32 at least if the head has a formula, else in the dtype of the
model's own. Read-only."""


def load_measured(name: str, dataset: Dataset, *, role: str, weights: Weights = "float32") -> Any:
    """Load the causal language model in the folder or of the hub name `name`, on the GPU if there is one. One that sees
    images and has its processor beside it is measured with them: `images_of` returns how it reads them.

    Its tokenizer and its head must fit `dataset`. The same holds for a resident teacher: its ids must mean what the
    dataset's ids mean. Errors name the model's `role`.

    Raises what `tokenizer_files`, `check_tokenizer` and `load_with_images` of `trainer.student` raise.
    """
    config = StudentConfig(model=name, weights=weights)
    try:
        files = tokenizer_files(config, dataset)
        check_tokenizer(files[TOKENIZER_FILE], dataset.header, name=name, dataset=dataset)
        model = load_with_images(config, dataset.header, files=files)
    except ColdstillError as error:
        raise error.at(role) from error
    model = model.eval().to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_attention(innermost(model), name=name)
    return model


@contextmanager
def measuring(*models: Any) -> Iterator[None]:
    """Evaluation mode and no gradients for `models`; None is skipped."""
    with evaluation_mode(*(model for model in models if model is not None)), torch.no_grad():
        yield


class LogitReader:
    """Logits of one model at target positions. The model must be in evaluation mode: its head is probed once.

    The logits `[M, V]` of one batch of long rows take gigabytes. So the hidden states `[M, D]` are kept, and the head
    is applied to a part of them on request. If `find_head` has no formula for the model's head, the model computes
    all its logits `[B, T, V]` once.
    """

    def __init__(self, model: torch.nn.Module, *, token_count: int):
        """`model`: a causal language model of transformers, or a wrapper of one.

        Columns of its head from `token_count` on are dropped. A wrapper that changes the logits, such as peft's prompt
        tuning, is run as a whole. Raises `WrapperUnsupported`.
        """
        self.token_count = token_count
        self._model: Any = innermost(model)
        wrapping = find_wrapping(model, self._model)
        self._whole = self._model if wrapping.transparent else without_parallel(model)
        self._added = wrapping.added
        self._formula = find_head(self._model)[0] if wrapping.transparent else None

    @property
    def device(self) -> torch.device:
        """Device of the model and of its logits."""
        return self._model.device

    def read(self, batch: Mapping[str, Any], targets: SparseTargets) -> LogitsOfPart:
        """Run the forward pass of `batch`; the result gives the logits at `targets`, which may be on any device."""
        inputs = {name: value.to(self.device) for name, value in model_inputs(batch, self._model).items()}
        row, position = targets.row.to(self.device), targets.position.to(self.device)
        if self._formula is None:
            found = self._whole(**inputs, use_cache=False).logits
            logits = found[row, position + self._added, : self.token_count]
            return lambda start, stop: logits[start:stop]
        hidden = before_head(self._model, **inputs, use_cache=False)[0][row, position]
        return self._of_parts(hidden, self._formula)

    def _of_parts(self, hidden: torch.Tensor, formula: HeadFormula) -> LogitsOfPart:
        scaled = hidden if formula.scale == 1 else hidden * formula.scale
        return logits_in_parts(scaled, formula.head(self._model, token_count=self.token_count))


class ShardedLogitReader(LogitReader):
    """Logits of a student that FSDP2 has sharded and that `distill_in_forward` has prepared.

    A forward pass gathers weights from all devices, so each device must run as many as the others.
    """

    def __init__(self, model: torch.nn.Module, *, token_count: int):
        """`model`: the root of the sharded modules."""
        self.token_count = token_count
        self._root, self._model = model, innermost(model)
        self._formula = distilling_of(self._model).formula

    def read(self, batch: Mapping[str, Any], targets: SparseTargets) -> LogitsOfPart:
        """Run the forward pass of `batch`; the result gives the logits at `targets`."""
        inputs = {name: value.to(self.device) for name, value in model_inputs(batch, self._model).items()}
        found = self._root(**inputs, targets=targets.to(self.device))
        if self._formula is None:
            return lambda start, stop: found["logits"][start:stop]
        return self._of_parts(found["hidden"], self._formula)

    def take_part(self) -> None:
        """Run the forward pass of one token, where another device has a batch and this one has none."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._root(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
