"""Loads the student, pretrained or from scratch, and checks that its head fits the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from coldstill.common.attention import PLAIN, attends_ahead, use_correct_attention
from coldstill.common.errors import first_line
from coldstill.common.files import did_you_mean
from coldstill.storage_schema.header import DatasetHeader
from coldstill.trainer.config import FROM_SCRATCH, StudentConfig
from coldstill.trainer.errors import (
    AdapterMisfit,
    AttentionMismatch,
    SpecialTokenInvalid,
    StudentHeadTooSmall,
    StudentNotFound,
)

from .freezing import freeze
from .lora import auto_class, is_adapter, load_adapted, unsaved_weights, with_adapters

logger = logging.get_logger(__name__)

_NAMED_ATTENTION = "_named_attention"


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens, None where it has none.

    `ends`: ids at which the student must stop: the tokenizer's own end first, then the teacher's. `token_count`: ids of
    the tokenizer.
    """

    bos: int | None
    pad: int | None
    ends: tuple[int, ...]
    token_count: int

    @property
    def by_name(self) -> dict[str, int | None]:
        """As a model's configuration names them."""
        eos = self.ends[0] if self.ends else None
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}

    def valid(self, ids: Any) -> list[int]:
        """Those of `ids`, a list or one id or None, that are ids of the tokenizer."""
        return [one for one in _listed(ids) if type(one) is int and 0 <= one < self.token_count]


def load_student(
    config: StudentConfig,
    header: DatasetHeader,
    special: SpecialTokens | None = None,
    *,
    image_token: int | None = None,
) -> PreTrainedModel | PeftModel:
    """The student of `config`, with adapters if `config.lora` is set or `config.model` holds some.

    `image_token`: the id of an image's patches in the tokenizer, for a student that reads images; None loads a student
    of text alone.

    Random weights (`from_scratch`, a missing head, adapters) come from torch's global generator: seed it first.

    `special`: the tokens of the tokenizer that is saved beside the student, which its configuration then names.

    Raises `StudentNotFound`, `StudentHeadTooSmall`, `AdapterMisfit`, `SpecialTokenInvalid`, `NothingToFreeze`.
    """
    images = image_token is not None
    options = {"dtype": getattr(torch, config.weights), "trust_remote_code": False}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    model: Any
    try:
        if config.model is not None and is_adapter(config.model):
            model = load_adapted(config.model, images=images, **options)
        elif config.model is not None:
            model = auto_class(images=images).from_pretrained(config.model, **options)
        else:
            model = auto_class(images=images).from_config(
                _configuration(config, header, special, image_token), **options
            )
    except (OSError, ValueError, ImportError, AttributeError, StrictDataclassError) as error:
        raise student_not_found(config.name, error) from error
    check_head(model, header, name=config.name)
    setattr(model, _NAMED_ATTENTION, config.attention)
    if config.from_scratch is not None:
        # Padding has no targets. If its id is also an end or a separator, its embedding must be trained.
        model.get_input_embeddings().padding_idx = None
    if special is not None:
        fit_end_tokens(model, special, name=config.name, from_scratch=config.from_scratch is not None)
    if config.freeze:
        freeze(model.get_base_model() if isinstance(model, PeftModel) else model, config.freeze, student=config.name)
    if config.lora is None:
        return model
    if isinstance(model, PeftModel):
        raise AdapterMisfit(
            "student.model with student.lora",
            found=f"{config.model} holds adapters already",
            wanted="a model without adapters",
            fix="remove student.lora to train the adapters further, or merge them into their base model first",
        )
    return with_adapters(model, config.lora)


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
            fix=f"set vocab_size: {header.token_count} in student.from_scratch, or in the config.json that it names"
            if name.endswith(FROM_SCRATCH)
            else f"call model.resize_token_embeddings({header.token_count}) and save the student again",
        )


def check_trainable(model: torch.nn.Module, *, name: str) -> None:
    """Raise `AdapterMisfit` if `model` has no weight to train, or one that is not saved with its adapters."""
    if not any(weight.requires_grad for weight in model.parameters()):
        raise AdapterMisfit(
            f"weights of the student {name}",
            found="all are frozen",
            wanted="at least one weight with requires_grad",
            fix="leave a part out of student.freeze; load adapters with PeftModel.from_pretrained(..., "
            "is_trainable=True), or add new ones to a base model",
        )
    if unsaved := unsaved_weights(model):
        raise AdapterMisfit(
            f"weights of the student {name}",
            found=f"{unsaved[0]} is trained ({len(unsaved)} such weights), and peft does not save it",
            wanted="trained weights that are part of the adapters",
            fix="set requires_grad to False for them, or name their modules in modules_to_save of the peft settings",
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
    """The `StudentNotFound` for an exception of a library, which takes a missing folder for a Hub name."""
    path = Path(name.removesuffix(FROM_SCRATCH))
    is_path = path.is_absolute() or len(path.parts) != 2 or path.parent.exists()
    missing = is_path and not path.exists() and len(path.parts) > 1
    return StudentNotFound(
        f"student {name}",
        found="no such folder" if missing else first_line(error),
        wanted="a folder, hub name or configuration of a causal language model that transformers can load",
        fix=(missing and did_you_mean(path))
        or "check the path, the name or the keys of student.from_scratch; without network, download a hub model first",
    )


def fit_end_tokens(model: Any, special: SpecialTokens, *, name: str, from_scratch: bool = False) -> None:
    """Let the generation config of `model` stop at each end of `special`, and remove ids that are none.

    A student learns to end as its teacher does. Its own generation config may name the ends of another tokenizer, or
    those of a base model. Adapters are saved without one, so for them this only warns.
    """
    found = model.generation_config
    before = None if found is None else found.eos_token_id
    own = special.valid(model.config.get_text_config(decoder=True).eos_token_id if before is None else before)
    ends = list(dict.fromkeys([*own, *special.ends]))
    if not ends:
        logger.warning(f"{name}: neither its tokenizer nor the dataset names an end token, so generation does not stop")
    if found is None:
        return
    for kind, value in special.by_name.items():
        configs = [model.config, model.config.get_text_config(decoder=True), found]
        for part in configs if kind != "eos_token_id" else configs[:2]:
            stated = _listed(getattr(part, kind, None))
            if stated and special.valid(stated) != stated:
                logger.warning(f"{name}: {kind} {stated} is no id of the tokenizer; {value} replaces it")
                setattr(part, kind, value)
    if ends != _listed(before):
        found.eos_token_id = (ends[0] if len(ends) == 1 else ends) if ends else None
        if not from_scratch:
            logger.warning(
                f"{name}: its generation config stops at {_listed(before)}, and the dataset's answers end at "
                f"{list(special.ends)}: generation_config.json gets eos_token_id {ends}. For adapters that are not "
                "merged, pass it to generate()."
            )


def _configuration(
    config: StudentConfig, header: DatasetHeader, special: SpecialTokens | None, image_token: int | None
) -> PretrainedConfig:
    """Configuration of a student from scratch. By default its head has one row per id of the tokenizer.

    Its special tokens are those of `special`, or those that `from_scratch` itself sets. The defaults of a class and the
    configuration of another model name the ids of another tokenizer. Raises `SpecialTokenInvalid`.
    """
    given = config.from_scratch if isinstance(config.from_scratch, dict) else {}
    inner = given.get("text_config")
    ids = {} if special is None else special.by_name
    for kind in ids:
        stated = given.get(kind, inner.get(kind) if isinstance(inner, dict) else None)
        if stated is None:
            continue
        assert special is not None
        if special.valid(stated) != _listed(stated):
            raise SpecialTokenInvalid(
                f"student.from_scratch.{kind}",
                found=stated,
                wanted=f"an id of the dataset's tokenizer, 0 to {special.token_count - 1}",
                fix=f"remove it: the dataset's tokenizer has {ids[kind]}",
            )
        ids[kind] = stated
    if given:
        found = AutoConfig.for_model(**{"vocab_size": header.token_count, **given, **ids})
    else:
        found = AutoConfig.from_pretrained(config.from_scratch, trust_remote_code=False)
    for part in (found, found.get_text_config(decoder=True)):
        for kind, value in ids.items():
            setattr(part, kind, value)
    for name in ("image_token_id", "image_token_index"):
        if image_token is not None and getattr(found, name, None) is not None:
            setattr(found, name, image_token)
    return found


def _listed(ids: Any) -> list[Any]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
