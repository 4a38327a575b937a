"""Before any unit is given out: header, tokenizer files and plan, made once and then held against every later start.

Settings in, `Prepared` out. Runs on the driver and loads no weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from storage_schema.errors import ColdstillError
from storage_schema.header import HEADER_NAME, Codec, DatasetHeader, TeacherFacts
from storage_schema.plan import PLAN_NAME, Unit, plan_from_bytes, plan_to_bytes
from storage_schema.store import Store
from storage_schema.tokenizer import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    TokenizerFacts,
    fingerprint_bytes,
)

from .config import CaptureConfig, TeacherConfig
from .errors import TeacherUnusable
from .sources.chat import SequenceMaker
from .sources.readers import open_source
from .teachers.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class Prepared:
    """A dataset directory that units can be committed to."""

    store: Store
    header: DatasetHeader
    units: list[Unit]


def prepare(
    config: CaptureConfig, *, rank_ids: Callable[[DatasetHeader, Unit], Sequence[int]] | None = None
) -> Prepared:
    """Create the dataset directory, or check that it is the one that `config` describes.

    `rank_ids`: the pilot that gives a new dataset's id rank table; none, no table.
    Raises `HeaderMismatch` for a changed configuration, and the errors of sources, templates and teachers.
    """
    store = Store(config.output)
    store.require_writable()
    source = open_source(config.source.path)
    tokenizer = load_tokenizer(config.teacher)
    maker = SequenceMaker(tokenizer, source=config.source, max_length=config.teacher.max_length)
    is_planned = store.exists(PLAN_NAME)
    units = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME) if is_planned else source.plan(config.rows_per_unit)
    maker.make(source.first())  # a template that cannot mark is refused before anything is started
    tokenizer_files = _files_of(tokenizer)
    facts = fingerprint_bytes(tokenizer_files[TOKENIZER_FILE], where=f"{config.teacher.model}: {TOKENIZER_FILE}")
    header = _header(config, facts, chat_template_sha256=maker.template_sha256, source_sha256=source.sha256())
    if not store.exists(HEADER_NAME):
        ranks = tuple(rank_ids(header, units[0])) if rank_ids and units else ()
        store.create(HEADER_NAME, header.model_copy(update={"id_ranks": ranks}).to_bytes())
    stored = DatasetHeader.from_bytes(store.read(HEADER_NAME), where=HEADER_NAME)
    stored.require_equal(
        header.model_copy(update={"id_ranks": stored.id_ranks}),
        where="the configuration",
        fix=f"{store.url} was begun with another value: put it back, or choose another output",
    )
    # Who receives the dataset can read its tokens without the teacher.
    for name, data in tokenizer_files.items():
        store.create(f"{TOKENIZER_FOLDER}/{name}", data)
    if not is_planned and not store.create(PLAN_NAME, plan_to_bytes(units)):
        units = plan_from_bytes(store.read(PLAN_NAME), where=PLAN_NAME)  # another driver was first
    return Prepared(store, stored, units)


def load_tokenizer(config: TeacherConfig) -> transformers.PreTrainedTokenizerBase:
    """The teacher's tokenizer. Raises `TeacherUnusable`."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, revision=config.revision)
    except (ValueError, OSError) as error:
        raise _unusable(config, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise TeacherUnusable(config.model, found="a slow tokenizer", wanted="one with a tokenizer.json")
    return tokenizer


def _header(
    config: CaptureConfig, facts: TokenizerFacts, *, chat_template_sha256: str | None, source_sha256: str
) -> DatasetHeader:
    teacher = config.teacher
    try:
        model_config = transformers.AutoConfig.from_pretrained(teacher.model, revision=teacher.revision)
    except (ValueError, OSError) as error:
        raise _unusable(teacher, "config.json", error) from None
    text_config = model_config.get_text_config()
    dtype = _dtype_name(teacher, text_config)
    if text_config.vocab_size < facts.token_count or teacher.top_k > facts.token_count:
        raise TeacherUnusable(
            f"{teacher.model}: vocab_size",
            found=f"{text_config.vocab_size} logit columns for {facts.token_count} token ids, top_k {teacher.top_k}",
            wanted="top_k <= token ids <= logit columns",
            fix="choose a smaller teacher.top_k, or the tokenizer that belongs to the model",
        )
    context = getattr(text_config, "max_position_embeddings", None)
    if context and teacher.max_length > context:
        raise TeacherUnusable(
            "teacher.max_length",
            found=teacher.max_length,
            wanted=f"at most {context}, the context of {teacher.model}",
            fix="lower teacher.max_length",
        )
    return DatasetHeader(
        codec=Codec.preset(config.fidelity, top_k=teacher.top_k),
        teacher=_teacher_facts(teacher, model_config, dtype),
        tokenizer_fingerprint=facts.fingerprint,
        chat_template_sha256=chat_template_sha256,
        vocab_size=text_config.vocab_size,
        token_count=facts.token_count,
        top_k=teacher.top_k,
        min_prob=teacher.min_prob,
        draws=teacher.draws,
        kept_draws=min(teacher.draws, teacher.kept_draws),
        draw_seed=teacher.draw_seed,
        tail="derived" if teacher.engine == "vllm" else "exact",
        loss_on=config.source.loss_on,
        max_length=teacher.max_length,
        over_long=config.source.over_long,
        rows_per_unit=config.rows_per_unit,
        source_sha256=source_sha256,
        licence=config.licence,
    )


def _teacher_facts(teacher: TeacherConfig, model_config: Any, dtype: str) -> TeacherFacts:
    folder = Path(teacher.model)
    commit = getattr(model_config, "_commit_hash", None)
    quantization = getattr(model_config, "quantization_config", None)
    return TeacherFacts(
        name=folder.name if folder.is_dir() else teacher.model,
        revision=None if folder.is_dir() else commit or teacher.revision,
        weights_fingerprint=weights_fingerprint(folder) if folder.is_dir() else f"commit:{commit}",
        dtype=dtype,
        head_dtype=dtype,
        quantization=str(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
    )


def _dtype_name(teacher: TeacherConfig, text_config: Any) -> str:
    if teacher.dtype != "auto":
        return teacher.dtype
    return str(getattr(text_config, "dtype", None) or "float32").removeprefix("torch.")


def _files_of(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The tokenizer's files by name, as transformers saves them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in TOKENIZER_FILES if Path(folder, name).exists()}


def _unusable(teacher: TeacherConfig, what: str, error: Exception) -> ColdstillError:
    return TeacherUnusable(
        f"teacher.model {teacher.model}: {what}",
        found=str(error).strip().splitlines()[0],
        wanted="a folder or hub name of a causal language model",
        fix="check teacher.model and teacher.revision",
    )
