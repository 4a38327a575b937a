"""The teacher's checkpoint: tokenizer, `config.json`, and facts about the weights for the header and the engines.

Only this file chooses the data type of the logits, so that header and engine agree. Data types are names such as
`bfloat16`. No weights are loaded.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers

from coldstill.common.errors import ColdstillError, first_line
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES, TokenizerFacts

_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10
_PLAIN = {"float32", "bfloat16", "float16"}


def load_tokenizer(config: TeacherConfig) -> transformers.PreTrainedTokenizerBase:
    """The teacher's tokenizer. Raises `TeacherUnusable`."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, revision=config.revision)
    except (ValueError, OSError) as error:
        raise _cannot_load(config, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise TeacherUnusable(config.model, found="a slow tokenizer", wanted="one with a tokenizer.json")
    return tokenizer


def end_token_ids(config: TeacherConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end the teacher's answers, in ascending order: those of its generation config, and the tokenizer's end
    of sequence.

    Without a generation config they are those of `config.json`, if they are special tokens: many a class of
    transformers has a default that belongs to another tokenizer.
    """
    ids: object = None
    try:
        ids = transformers.GenerationConfig.from_pretrained(config.model, revision=config.revision).eos_token_id
    except (ValueError, OSError):
        with suppress(ValueError, OSError):
            stored = transformers.AutoConfig.from_pretrained(config.model, revision=config.revision)
            special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
            ids = [id_ for id_ in _listed(stored.get_text_config().eos_token_id) if id_ in special]
    found = {*_listed(ids), *_listed(tokenizer.eos_token_id)}
    return tuple(sorted(id_ for id_ in found if 0 <= id_ < len(tokenizer)))


def tokenizer_files(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that transformers saves for the tokenizer, by name; only those that a dataset carries."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in TOKENIZER_FILES if Path(folder, name).exists()}


def load_model_config(config: TeacherConfig, facts: TokenizerFacts) -> Any:
    """The teacher's `config.json`. Raises `TeacherUnusable` if the settings do not fit it."""
    try:
        model_config = transformers.AutoConfig.from_pretrained(config.model, revision=config.revision)
    except (ValueError, OSError) as error:
        raise _cannot_load(config, "config.json", error) from None
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


def weights_fingerprint(folder: Path) -> str:
    """A digest of the weights, equal for equal copies, without reading hundreds of gigabytes.

    sha256 over name, size and 64 evenly spaced samples of 64 KiB of each weight file in `folder`, and over
    `config.json`. The samples include the header at the start of a safetensors file.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.exists():
        digest.update(config.read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def dtype_of(config: TeacherConfig, model_config: Any) -> str:
    """Data type of the weights in the engine."""
    if config.dtype != "auto":
        return config.dtype
    return str(getattr(model_config.get_text_config(), "dtype", None) or "float32").removeprefix("torch.")


def quantization_of(config: TeacherConfig, model_config: Any) -> str | None:
    """Name of the weights' quantization: the one set for the engine, or the one that they are stored in."""
    if configured := config.engine_args.get("quantization"):
        return str(configured)
    stored = getattr(model_config, "quantization_config", None)
    return str(stored.get("quant_method")) if isinstance(stored, dict) else None


def head_dtype_of(config: TeacherConfig, model_config: Any) -> str:
    """Data type of the logits.

    `auto` is float32 for float32 weights, and for plain half-precision weights in transformers and in vLLM with the
    tap, which can compute the head in float32: the rounding of a bfloat16 head changes half of the ranks. Otherwise,
    and with the user's own class, it is the data type of the weights.
    """
    dtype = dtype_of(config, model_config)
    if config.head_dtype == "float32":
        return "float32"
    is_plain = dtype in _PLAIN and quantization_of(config, model_config) is None
    has_float32_head = is_plain and not config.is_own_class and config.can_draw
    if config.head_dtype == "auto" and (dtype == "float32" or has_float32_head):
        return "float32"
    return dtype


def _listed(ids: object) -> list[int]:
    """`eos_token_id` of any configuration as a list: it may be one id, several, or None."""
    return [int(id_) for id_ in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(id_, int)]


def _cannot_load(teacher: TeacherConfig, what: str, error: Exception) -> ColdstillError:
    """The error for a part of the teacher, such as its `config.json`, that failed to load."""
    return TeacherUnusable(
        f"teacher.model {teacher.model}: {what}",
        found=first_line(error),
        wanted="a folder or Hub name of a causal language model",
        fix="check teacher.model and teacher.revision",
    )
