"""LoRA adapters by peft: adds them to a model, and merges them into its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from coldstill.common.errors import first_line
from coldstill.trainer.config import LoraConfig
from coldstill.trainer.errors import AdapterMisfit


def with_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` frozen, with trainable float32 adapters, whatever the dtype of the frozen weights.

    Raises `AdapterMisfit` if no layer has a name in `target_modules`.
    """
    settings = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise AdapterMisfit(
            "student.lora.target_modules",
            found=config.target_modules,
            wanted=first_line(error),
            fix="set it to all-linear, or to layers of this model, such as q_proj",
        ) from error


def merged(base: str, adapter: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model `base` in `dtype`, with the adapters in the folder `adapter` added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
