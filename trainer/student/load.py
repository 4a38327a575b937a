"""Loading the student: its settings and a dataset's header come in, a model whose head fits goes out."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from coldstill.storage_schema.header import DatasetHeader
from coldstill.trainer.config import StudentConfig

from .adapter import with_adapters
from .checks import check_head
from .not_found import student_not_found


def load_student(config: StudentConfig, header: DatasetHeader) -> PreTrainedModel:
    """The model, checked against the dataset before a step is taken; with adapters where `config.lora` is given.

    Random weights (`from_scratch`, a new head, adapters) come from torch's generator: seed it first.
    Raises `StudentNotFound`, `StudentHeadTooSmall`, and of adapters what `with_adapters` raises.
    """
    options = {"dtype": getattr(torch, config.weights)}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    try:
        if config.model is not None:
            model = AutoModelForCausalLM.from_pretrained(config.model, **options)
        else:
            model = AutoModelForCausalLM.from_config(_configuration(config, header), **options)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise student_not_found(config.name, error) from error
    check_head(model, header, name=config.name)
    return model if config.lora is None else with_adapters(model, config.lora)


def _configuration(config: StudentConfig, header: DatasetHeader) -> PretrainedConfig:
    """Of a student from scratch; its head has a row per id of the tokenizer where nothing else is said."""
    if isinstance(config.from_scratch, dict):
        return AutoConfig.for_model(**{"vocab_size": header.token_count, **config.from_scratch})
    return AutoConfig.from_pretrained(config.from_scratch)
