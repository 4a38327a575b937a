"""A causal language model of transformers, loaded as the header says: weights, device, data type of the head."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.storage_schema.header import DatasetHeader


def load_model(config: TeacherConfig, header: DatasetHeader) -> Any:
    """The model in evaluation, on the GPU where there is one; its logits are of the header's `head_dtype`.

    Raises `TeacherUnusable`.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, revision=config.revision, dtype=config.dtype, **config.engine_args
        )
    except (ValueError, OSError) as error:
        raise TeacherUnusable(
            config.model, found=str(error).strip().splitlines()[0], wanted="a model that transformers loads"
        ) from error
    if "device_map" not in config.engine_args:  # accelerate has placed it then, and moves tensors by itself
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if header.teacher.head_dtype == "float32" and model.dtype != torch.float32:
        model.set_output_embeddings(_float32_head(config, model.get_output_embeddings()))
    return model.eval()


def end_tokens(model: Any, tokenizer: transformers.PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's end of sequence."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(id_) for id_ in [*ids, tokenizer.eos_token_id] if id_ is not None)


class _Float32Head(nn.Module):
    """A copy of a linear head in float32. What the model does to its logits after it (scales, caps) is float32 too."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.linear = copy.deepcopy(head).float()

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` of any float type to float32 logits `[..., V]`."""
        logits: Tensor = self.linear(hidden.float())
        return logits


def _float32_head(config: TeacherConfig, head: object) -> nn.Module:
    if type(head) is not nn.Linear:
        raise TeacherUnusable(
            f"{config.model}: output embeddings",
            found=type(head).__name__,
            wanted="a plain linear layer, whose float32 copy gives float32 logits",
            fix="teacher.head_dtype: model",
        )
    return _Float32Head(head)
