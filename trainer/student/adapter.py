"""Low-rank adapters by peft: a model comes in, the same model with adapters goes out; and back into plain weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from coldstill.trainer.config import LoraConfig
from coldstill.trainer.errors import AdapterMisfit


def with_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` frozen, with trainable adapters. They are float32, whatever the type of the frozen weights.

    Raises `AdapterMisfit` where no layer has one of the names that `target_modules` asks for.
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
            wanted=str(error).strip().splitlines()[0],
            fix="leave it at all-linear, or name layers of this model, such as q_proj",
        ) from error


def merged(base: str, adapter: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model `base` with the adapters in the folder `adapter` added to its weights, of type `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
