"""The teacher's checkpoint: tokenizer, `config.json`, and facts about the weights for the header and the engines.

Only this file chooses the data type of the logits, so that header and engine agree. Data types are names such as
`bfloat16`. No weights are loaded here; an engine that has loaded them calls `check_weights`.
"""

from __future__ import annotations

import json
import re
import socket
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import numpy as np
import transformers
from transformers.utils import cached_file

from coldstill.common.errors import ColdstillError, first_line
from coldstill.common.processor import load_processor, sees_images
from coldstill.pipeline.config import READ_FACTOR, CaptureConfig, TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.teachers.engine_args import quantization_of
from coldstill.pipeline.teachers.image_expansion import ImageRules
from coldstill.pipeline.teachers.image_probe import PROBE_TOKENS, image_probe
from coldstill.pipeline.teachers.protocol import (
    ScoredSequence,
    ScoreResult,
    TokenSequence,
    UnscoredSequence,
    scored_of,
)
from coldstill.storage_schema.header import MAX_TOKENS, DatasetHeader
from coldstill.storage_schema.tokenizer import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TokenizerFacts,
    load_faithfully,
    without_code,
)

_PLAIN = {"float32", "bfloat16", "float16"}

TRIES = 3
"""Sets of random tokens. In one set a healthy teacher may meet a token whose embedding was never trained."""
_PROBE_LENGTHS = (2, 16, 17)

Score = Callable[[Sequence[TokenSequence]], Sequence[ScoreResult]]


def load_tokenizer(config: TeacherConfig) -> transformers.PreTrainedTokenizerBase:
    """The teacher's tokenizer. Raises `TeacherUnusable`, and `TokenizerUnfaithful` for one that loses text."""
    _require_reachable(config)
    _require_whole_model(config)
    loaders = [
        lambda: transformers.AutoTokenizer.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=_trusts_code(config)
        ),
        lambda: transformers.PreTrainedTokenizerFast.from_pretrained(config.model, revision=config.revision),
    ]
    try:
        stored = _file(config, TOKENIZER_FILE)
        tokenizer = load_faithfully(loaders, stored.read_bytes() if stored else None, where=config.model)
    except (ValueError, OSError, ImportError) as error:
        raise _cannot_load(config, "tokenizer", error) from None
    if not tokenizer.is_fast:
        raise TeacherUnusable(config.model, found="a slow tokenizer", wanted="one with a tokenizer.json")
    return tokenizer


def _require_reachable(config: TeacherConfig) -> None:
    """Raise `TeacherUnusable` for a name that is no folder and not in the Hub's cache if the Hub's host has no address.

    Without a network, the Hub's client repeats each request for a minute.
    """
    if Path(config.model).is_dir() or urllib.request.getproxies():
        return  # a proxy finds the address
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError as error:
        with suppress(OSError, ValueError):
            if cached_file(config.model, "config.json", revision=config.revision, local_files_only=True):
                return
        raise TeacherUnusable(
            f"teacher.model {config.model}",
            found=f"neither a folder nor in the Hub's cache, and the Hub cannot be reached: {first_line(error)}",
            wanted="a folder or Hub name of a causal language model",
            fix="check teacher.model and the network",
        ) from None


def _require_whole_model(config: TeacherConfig) -> None:
    """Raise `TeacherUnusable` for a folder without a model, and for an adapter: its place is `teacher.adapter`."""
    adapter, whole = _file(config, "adapter_config.json"), _file(config, "config.json")
    if adapter is None and whole is None and Path(config.model).is_dir():
        raise TeacherUnusable(  # transformers would advise to install packages
            f"teacher.model {config.model}",
            found="a folder without config.json",
            wanted="a folder or Hub name of a causal language model",
            fix="check teacher.model",
        )
    if adapter is None:
        return
    try:
        base = json.loads(adapter.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = "its base model"
    raise TeacherUnusable(
        f"teacher.model {config.model}",
        found="an adapter (adapter_config.json) " + ("beside a config.json" if whole else "without a config.json"),
        wanted="a whole model",
        fix=f"set teacher.adapter: {config.model}, and teacher.model to {base}"
        + ("; if these weights are merged already, remove adapter_config.json" if whole else ""),
    )


def _file(config: TeacherConfig, name: str) -> Path | None:
    """A file of the teacher's folder or of its repository on the Hub; None too if the Hub cannot be reached, or if the
    name is wrong, which is told where the whole is loaded."""
    try:
        path = cached_file(
            config.model,
            name,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return Path(path) if path else None


def _trusts_code(config: TeacherConfig) -> bool:
    return bool(config.engine_args.get("trust_remote_code", False))


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
        with suppress(TeacherUnusable):
            stored = _model_config(config).get_text_config()
            special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
            ids = [id_ for id_ in _listed(stored.eos_token_id) if id_ in special]
    found = {*_listed(ids), *_listed(tokenizer.eos_token_id)}
    return tuple(sorted(id_ for id_ in found if 0 <= id_ < len(tokenizer)))


def tokenizer_files(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that transformers saves for the tokenizer, by name; only those that a dataset carries.

    A configuration that names the tokenizer's code is stored without it: a student's folder does not hold that code.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {name: Path(folder, name).read_bytes() for name in TOKENIZER_FILES if Path(folder, name).exists()}
        return without_code(files, where=folder)


def load_teacher_processor(config: TeacherConfig) -> Any | None:
    """The processor of a teacher that sees images, None for one of text only.

    Raises `TeacherUnusable`, and `ProcessorUnusable` for a processor that is missing or needs another package.
    """
    if not sees_images(_model_config(config)):
        return None
    return load_processor(
        transformers.AutoProcessor, config.model, revision=config.revision, trust_remote_code=_trusts_code(config)
    )


def load_model_config(config: TeacherConfig, facts: TokenizerFacts) -> Any:
    """The teacher's `config.json`. Raises `TeacherUnusable` if the settings do not fit it."""
    model_config = _model_config(config)
    text_config = model_config.get_text_config()
    if text_config.vocab_size < facts.token_count or config.top_k > facts.token_count:
        raise TeacherUnusable(
            f"{config.model}: vocab_size",
            found=f"{text_config.vocab_size} logit columns for {facts.token_count} token ids, top_k {config.top_k}",
            wanted="top_k <= token ids <= logit columns",
            fix="choose a smaller teacher.top_k, or the tokenizer that belongs to the model",
        )
    context = _context(model_config)
    if context and config.read_length > context:
        key = "max_read_length" if config.max_read_length else "max_length"
        raise TeacherUnusable(
            f"teacher.{key}",
            found=config.read_length,
            wanted=f"at most {context}, the context of {config.model}",
            fix=f"set teacher.{key}: {context}, or less",
        )
    return model_config


def with_read_length(config: CaptureConfig) -> CaptureConfig:
    """The settings with the default of `teacher.max_read_length` in its place, if the teacher has its own prompt.

    Raises `TeacherUnusable` for a model without a `config.json`.
    """
    teacher = config.teacher
    if not config.source.teacher_prompt_rule or teacher.max_read_length is not None:
        return config
    most = max(teacher.max_length, _context(_model_config(teacher)) or MAX_TOKENS)
    length = min(READ_FACTOR * teacher.max_length, most, MAX_TOKENS)
    return config.model_copy(update={"teacher": teacher.model_copy(update={"max_read_length": length})})


def _context(model_config: Any) -> int | None:
    """The model's maximum number of positions, if it has one."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None) or None


def _model_config(config: TeacherConfig) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=_trusts_code(config)
        )
    except (ValueError, OSError, ImportError) as error:
        raise _cannot_load(config, "config.json", error) from None


def dtype_of(config: TeacherConfig, model_config: Any) -> str:
    """Data type of the weights in the engine."""
    if config.dtype != "auto":
        return config.dtype
    # The configuration of a model that sees images may state it at the top alone; both engines read it there first.
    stated = (getattr(of, "dtype", None) for of in (model_config, model_config.get_text_config()))
    return str(next(filter(None, stated), "float32")).removeprefix("torch.")


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


def random_sequences(
    lengths: Sequence[int], header: DatasetHeader, *, seed: int, images: ImageRules | None = None
) -> list[TokenSequence]:
    """Sequences of random tokens of at most these lengths; all positions are targets.

    Of a teacher with `images`, without the tokens that stand for images.
    """
    generator = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(header.token_count), list(images.reserved)) if images else None
    sequences = []
    for number, length in enumerate(min(length, header.max_length) for length in lengths):
        drawn = generator.integers(0, header.token_count if allowed is None else allowed.size, length)
        token_ids = (drawn if allowed is None else allowed[drawn]).astype(np.int32)
        spans = np.array([[0, length - 1]], np.int32)
        name = f"self-check-{number}"
        sequences.append(TokenSequence(sample_id=name, source_row=number, token_ids=token_ids, target_spans=spans))
    return sequences


def require_finite(score: Score, sets: Iterator[Sequence[TokenSequence]], *, model: str) -> list[ScoredSequence]:
    """The results of the first set of sequences that all have finite logits. Raises `TeacherUnusable` if none has."""
    found = ""
    for sequences in sets:
        results = score(sequences)
        _require_readable_images(results, model=model)
        scored = scored_of(results)
        if len(scored) == len(sequences):
            return scored
        found = f"NaN or infinite logits in {len(sequences) - len(scored)} of {len(sequences)} short random sequences"
    raise TeacherUnusable(
        f"weights of {model}",
        found=found,
        wanted="finite logits",
        fix="check the model's files for NaN, or set another teacher.dtype: the model may overflow in this one",
    )


def _require_readable_images(results: Sequence[ScoreResult], *, model: str) -> None:
    for result in results:
        if isinstance(result, UnscoredSequence) and result.reason is not RejectReason.NON_FINITE_LOGITS:
            raise TeacherUnusable(
                f"images of {model}: a row of {PROBE_TOKENS} tokens with one small image",
                found=f"{result.reason}: {result.detail}",
                wanted="a row that the engine expands and scores",
                fix="raise teacher.max_length if the row is too long, or set teacher.engine: transformers",
            )


def check_weights(score: Score, header: DatasetHeader, *, model: str, images: ImageRules | None = None) -> None:
    """Score a few short sequences, and one with an image if the teacher sees `images`.

    Raises `TeacherUnusable` for weights that give NaN or infinite logits, and for an engine that cannot expand images,
    which would otherwise show as rejected rows.
    """

    def made(seed: int) -> list[TokenSequence]:
        sequences = random_sequences(_PROBE_LENGTHS, header, seed=seed, images=images)
        return [*sequences, image_probe(header, images, seed=seed)] if images else sequences

    require_finite(score, (made(seed) for seed in range(TRIES)), model=model)


def _listed(ids: object) -> list[int]:
    """`eos_token_id` of any configuration as a list: it may be one id, several, or None."""
    return [int(id_) for id_ in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(id_, int)]


def _cannot_load(teacher: TeacherConfig, what: str, error: Exception) -> ColdstillError:
    """The error for a part of the teacher, such as its `config.json`, that failed to load."""
    return TeacherUnusable(
        f"teacher.model {teacher.model}: {what}",
        found=first_line(error),
        wanted="a folder or Hub name of a causal language model",
        fix=way_out(error) or "check teacher.model and teacher.revision",
    )


def way_out(error: Exception) -> str:
    """What to do about an error of transformers or vLLM that names a missing package, code to trust or an argument,
    else nothing."""
    text = " ".join(str(error).split())
    if isinstance(error, TypeError) and "keyword argument" in text:
        return "remove that argument from teacher.engine_args, or correct its name"
    if "trust_remote_code" in text:
        return "read the model's own code, then set teacher.engine_args: {trust_remote_code: true}"
    for pattern in _MISSING:
        if match := pattern.search(text):
            names = re.split(r"[ ,]+(?:or )?", match[1].strip(" .").lower())
            return f"pip install {' '.join(_PACKAGES.get(name, name) for name in names)}, on each node"
    return ""


_MISSING = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"requires the ([\w-]+) library",
        r"not found in your environment: ([\w, -]+)",
        r"No module named '([\w-]+)",
        r"`?pip install ([\w-]+(?: [\w-]+)*)`",
        r"need to have ([\w-]+ or [\w-]+) installed",
    )
)
_PACKAGES = {"pil": "pillow", "cv2": "opencv-python-headless", "google": "protobuf", "sklearn": "scikit-learn"}
