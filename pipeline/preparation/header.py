"""The header of a capture: settings, the teacher's configuration and the tokenizer's facts in, a `DatasetHeader` out.

It holds no time, host or path: equal captures have equal headers, whatever the machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from coldstill.pipeline.config import CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.sources.chat import SequenceMaker
from coldstill.pipeline.teachers.weights import dtype_of, head_dtype_of, quantization_of, weights_fingerprint
from coldstill.pipeline.tokenizer import unusable
from coldstill.storage_schema.header import Codec, DatasetHeader, TeacherFacts
from coldstill.storage_schema.tokenizer import TokenizerFacts

_LOSS_ON = {"generate": "last_turn", "pretrain": "all"}
"""What the modes learn, where the source has no say: the teacher's answer, every token."""


def load_model_config(config: TeacherConfig, facts: TokenizerFacts) -> Any:
    """The teacher's `config.json`. Raises `TeacherUnusable` where the settings do not fit it."""
    try:
        model_config = transformers.AutoConfig.from_pretrained(config.model, revision=config.revision)
    except (ValueError, OSError) as error:
        raise unusable(config, "config.json", error) from None
    text_config = model_config.get_text_config()
    if text_config.vocab_size < facts.token_count or config.top_k > facts.token_count:
        raise TeacherUnusable(
            f"{config.model}: vocab_size",
            found=f"{text_config.vocab_size} logit columns for {facts.token_count} token ids, top_k {config.top_k}",
            wanted="top_k <= token ids <= logit columns",
            fix="choose a smaller teacher.top_k, or the tokenizer that belongs to the model",
        )
    context = getattr(text_config, "max_position_embeddings", None)
    if context and config.max_length > context:
        raise TeacherUnusable(
            "teacher.max_length",
            found=config.max_length,
            wanted=f"at most {context}, the context of {config.model}",
            fix="lower teacher.max_length",
        )
    return model_config


def make_header(
    config: CaptureConfig, *, model_config: Any, facts: TokenizerFacts, maker: SequenceMaker, source_sha256: str
) -> DatasetHeader:
    """The header, without an id rank table."""
    teacher = config.teacher
    return DatasetHeader(
        teacher=_teacher_facts(teacher, model_config),
        tokenizer_fingerprint=facts.fingerprint,
        chat_template_sha256=maker.template_sha256,
        vocab_size=model_config.get_text_config().vocab_size,
        token_count=facts.token_count,
        top_k=teacher.top_k,
        min_prob=teacher.min_prob,
        draws=teacher.draws,
        kept_draws=min(teacher.draws, teacher.kept_draws),
        draw_logprobs=teacher.draw_logprobs,
        draw_seed=teacher.draw_seed,
        codec=Codec.preset(config.fidelity, top_k=teacher.top_k),
        tail="exact" if teacher.can_draw else "derived",
        mode=config.mode,
        documents=config.documents if config.mode == "pretrain" else None,
        sampling=config.sampling.model_dump(mode="json") if config.mode == "generate" else None,
        loss_on=_LOSS_ON.get(config.mode, config.source.loss_on),
        order=config.order,
        max_length=teacher.max_length,
        over_long=maker.over_long,
        rows_per_unit=config.rows_per_unit,
        source_sha256=source_sha256,
        licence=config.licence,
    )


def _teacher_facts(teacher: TeacherConfig, model_config: Any) -> TeacherFacts:
    folder = Path(teacher.model)
    commit = getattr(model_config, "_commit_hash", None)
    return TeacherFacts(
        name=folder.name if folder.is_dir() else teacher.model,
        revision=None if folder.is_dir() else commit or teacher.revision,
        weights_fingerprint=weights_fingerprint(folder) if folder.is_dir() else f"commit:{commit}",
        dtype=dtype_of(teacher, model_config),
        head_dtype=head_dtype_of(teacher, model_config),
        quantization=quantization_of(teacher, model_config),
    )
