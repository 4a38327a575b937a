"""Loads the student, pretrained or from scratch, and checks that its head fits the dataset."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from coldstill.common.attention import PLAIN, attends_ahead, use_correct_attention
from coldstill.common.errors import first_line
from coldstill.storage_schema.header import DatasetHeader
from coldstill.trainer.config import StudentConfig
from coldstill.trainer.errors import AttentionMismatch, StudentHeadTooSmall, StudentNotFound

from .lora import with_adapters

logger = logging.get_logger(__name__)

_NAMED_ATTENTION = "_named_attention"


def load_student(config: StudentConfig, header: DatasetHeader) -> PreTrainedModel:
    """The student of `config`, with adapters if `config.lora` is set.

    Random weights (`from_scratch`, a missing head, adapters) come from torch's global generator: seed it first.

    Raises `StudentNotFound`, `StudentHeadTooSmall`, `AdapterMisfit`.
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
    setattr(model, _NAMED_ATTENTION, config.attention)
    return model if config.lora is None else with_adapters(model, config.lora)


def check_head(model: PreTrainedModel, header: DatasetHeader, *, name: str) -> None:
    """Raise `StudentHeadTooSmall` if an id of the dataset's tokenizer has no row in the student's head.

    More rows than ids are allowed: the further rows are excluded from every softmax. Models of one family often differ
    in such padding (152,064 and 151,936 rows in Qwen2.5).
    """
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < header.token_count:
        raise StudentHeadTooSmall(
            f"head of the student {name}",
            found=f"{rows} rows",
            wanted=f"at least {header.token_count}, one per id of the dataset's tokenizer",
            fix=f"call model.resize_token_embeddings({header.token_count}) and save the student again",
        )


def check_attention(model: PreTrainedModel, *, name: str) -> None:
    """Set `model` to eager attention, with a warning, if its own implementation gives other logits.

    Its saved configuration then names eager attention, and `from_pretrained` uses it. Call it on the device of the
    training and without autocast. Raises `AttentionMismatch` if `StudentConfig.attention` named the implementation, or
    if the model attends to later tokens.
    """
    named = getattr(model, _NAMED_ATTENTION, None)
    with torch.no_grad():
        difference = use_correct_attention(model)
        if attends_ahead(model):
            raise AttentionMismatch(
                f"attention of the student {name}",
                found=f"logits of a {type(model).__name__} that depend on later tokens",
                wanted="a causal language model",
                fix="if its class can be a decoder, set is_decoder to true in its config.json",
            )
    if difference is not None and named is not None:
        raise AttentionMismatch(
            f"attention of the student {name}",
            found=str(difference),
            wanted="an implementation with everything that the model's configuration requests, such as a soft-cap",
            fix=f"set student.attention to {PLAIN}, or to null",
        )
    if difference is not None:
        logger.warning(f"{name}: {difference}, so {PLAIN} attention is used")
    if difference is not None or named == PLAIN:
        model.config.attn_implementation = PLAIN


def student_not_found(name: str, error: Exception) -> StudentNotFound:
    """The `StudentNotFound` for an exception of a library."""
    return StudentNotFound(
        f"student {name}",
        found=first_line(error),
        wanted="a folder, hub name or configuration of a causal language model that transformers can load",
        fix="check student.model or student.from_scratch; without network access, download a hub model first",
    )


def _configuration(config: StudentConfig, header: DatasetHeader) -> PretrainedConfig:
    """Configuration of a student from scratch. By default its head has one row per id of the tokenizer."""
    if isinstance(config.from_scratch, dict):
        return AutoConfig.for_model(**{"vocab_size": header.token_count, **config.from_scratch})
    return AutoConfig.from_pretrained(config.from_scratch)
