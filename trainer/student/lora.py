"""Adapters by peft: adds them to a model, loads them, and merges them into its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from coldstill.common.errors import first_line
from coldstill.trainer.config import LoraConfig
from coldstill.trainer.errors import AdapterMisfit


def with_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` frozen, with trainable float32 adapters, whatever the dtype of the frozen weights.

    Only the language model gets adapters. What it is shown of images or sound stays as it was pretrained.

    Raises `AdapterMisfit` if no layer has a name in `target_modules`.
    """
    settings = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        exclude_modules=outside_language_model(model) or None,
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


def outside_language_model(model: PreTrainedModel) -> list[str]:
    """Names of the layers with weights that are neither in the decoder of `model` nor its head, such as those of a
    vision tower; empty for a plain language model."""
    decoder = model.get_decoder()
    inside = {id(part) for part in (decoder.modules() if decoder is not None else model.modules())}
    inside |= {id(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    return [name for name, part in model.named_modules() if part._parameters and id(part) not in inside]


def is_adapter(name: str) -> bool:
    """Whether the folder or hub name `name` holds adapters of peft. Raises `OSError`."""
    return find_adapter_config_file(name) is not None


def auto_class(*, images: bool) -> Any:
    """The class of transformers that loads a student, one that reads `images` or one of text alone."""
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def load_adapted(name: str, *, images: bool = False, **options: Any) -> PeftModel:
    """The adapters in the folder or of the hub name `name` on their base model, trainable where peft supports it.

    By peft: the loader of transformers refuses prompt learning, and replaces DoRA's magnitudes by fresh ones.
    """
    config = PeftConfig.from_pretrained(name)
    if not config.base_model_name_or_path:
        raise ValueError(f"adapter_config.json of {name} names no base model")
    model = auto_class(images=images).from_pretrained(config.base_model_name_or_path, **options)
    adapted = PeftModel.from_pretrained(model, name, is_trainable=not config.is_prompt_learning)
    # peft leaves the base model trainable where it loads a prompt for inference.
    return adapted.requires_grad_(False) if config.is_prompt_learning else adapted


def unsaved_weights(model: torch.nn.Module) -> list[str]:
    """Names of trained weights that are not among the adapters that `save_pretrained` of peft writes."""
    if not isinstance(model, PeftModel):
        return []
    if model.active_peft_config.is_prompt_learning:
        base: Any = model.get_base_model()
        return [name for name, weight in base.named_parameters() if weight.requires_grad]
    saved = {weight.data_ptr() for weight in get_peft_model_state_dict(model).values()}
    trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return [name for name, weight in trained if weight.data_ptr() not in saved]


def merged(base: str, adapter: Path, *, dtype: torch.dtype, images: bool = False) -> PreTrainedModel:
    """The model `base` in `dtype`, with the adapters in the folder `adapter` added to its weights.

    A weight with an adapter that another layer shares is untied first: that layer has no such adapter.
    """
    model = PeftModel.from_pretrained(auto_class(images=images).from_pretrained(base, dtype=dtype), str(adapter))
    _untie(model)
    plain: PreTrainedModel = model.merge_and_unload()
    return plain


def _untie(model: PeftModel) -> None:
    uses = Counter(id(weight) for part in model.modules() for weight in part._parameters.values() if weight is not None)
    adapted: list[Any] = [part.get_base_layer() for part in model.modules() if isinstance(part, BaseTunerLayer)]
    shared = [layer for layer in adapted if uses[id(getattr(layer, "weight", None))] > 1]
    for layer in shared:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    if shared:
        base: Any = model.get_base_model()
        for config in (base.config, base.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
