"""The teacher's checkpoint: tokenizer, `config.json`, and facts about the weights for the header and the engines.

Only this file chooses the data type of the logits, so that header and engine agree. Data types are names such as
`bfloat16`. No weights are loaded.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from pydantic import JsonValue

from coldstill.common.errors import ColdstillError, first_line
from coldstill.common.plugins import is_plugin
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


def _cannot_load(teacher: TeacherConfig, what: str, error: Exception) -> ColdstillError:
    """The error for a part of the teacher, such as its `config.json`, that failed to load."""
    return TeacherUnusable(
        f"teacher.model {teacher.model}: {what}",
        found=first_line(error),
        wanted="a folder or Hub name of a causal language model",
        fix="check teacher.model and teacher.revision",
    )


_FREE = {
    "vllm": """
        tensor_parallel_size pipeline_parallel_size data_parallel_size prefill_context_parallel_size
        decode_context_parallel_size enable_expert_parallel distributed_executor_backend nnodes node_rank master_addr
        master_port device_ids numa_bind numa_bind_nodes numa_bind_cpus distributed_timeout_seconds
        cpu_distributed_timeout_seconds disable_custom_all_reduce ray_workers_use_nsight
        gpu_memory_utilization kv_cache_memory_bytes swap_space cpu_offload_gb cpu_offload_params offload_group_size
        num_gpu_blocks_override block_size enable_sleep_mode enable_cumem_allocator
        max_num_seqs max_num_batched_tokens max_num_scheduled_tokens max_num_partial_prefills
        max_long_partial_prefills long_prefill_token_threshold enable_chunked_prefill enable_prefix_caching
        prefix_caching_hash_algo scheduling_policy async_scheduling stream_interval
        enforce_eager compilation_config cudagraph_capture_sizes max_cudagraph_capture_size
        disable_log_stats disable_log_requests log_level logging_config aggregate_engine_logging
        show_hidden_metrics_for_version collect_detailed_traces otlp_traces_endpoint kv_cache_metrics kv_events_config
        profiler_config use_tqdm_on_load served_model_name shutdown_timeout
        download_dir max_parallel_loading_workers safetensors_load_strategy safetensors_prefetch_num_threads
        safetensors_prefetch_block_size skip_tokenizer_init tokenizer_mode
    """,
    "transformers": """
        device_map max_memory offload_folder offload_state_dict offload_buffers low_cpu_mem_usage tp_plan tp_size
        cache_dir force_download proxies local_files_only use_safetensors weights_only
    """,
    "endpoint": "concurrency timeout_s attempts",
}
"""Arguments of `teacher.engine_args` that change no value beyond an engine's tolerance, such as how weights are loaded
and placed, how much memory is used and what is scheduled together. All others count as changing values."""
_SECRET = re.compile(
    r"^(hf_|(use_)?auth_|access_|api_|bearer_)?token$|secret|passw|api_?key|credential|authorization", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"\b(hf_\w{20,}|sk-[\w-]{20,})|(?<=://)[^/@\s]+@")
"""Tokens of the Hub and of endpoints, and the user and password of an address."""
_MAX_TEXT = 1000


def engine_args_that_change_values(engine: str, engine_args: Mapping[str, Any]) -> dict[str, JsonValue]:
    """The part of `teacher.engine_args` that decides the values of a dataset, for its header: canonical JSON.

    An argument that is not listed as free counts, so that a new one cannot be missed. The user's own class counts too,
    by its name. Of a local path only the last part is kept, and a secret never enters. Raises `TeacherUnusable` for a
    value that is not JSON.
    """
    free = set(_FREE.get(engine, "").split())
    changing = {
        name: _canonical(engine_args[name], name)
        for name in sorted(engine_args)
        if name not in free and not _SECRET.search(name)
    }
    return {"engine": engine, **changing} if is_plugin(engine) else changing


def _canonical(value: Any, name: str) -> JsonValue:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 1 << 53 else value
    if isinstance(value, str):
        return _portable(value)
    if isinstance(value, Mapping):
        keys = sorted(str(key) for key in value if not _SECRET.search(str(key)))
        inner = {str(key): item for key, item in value.items()}
        return {key: _canonical(inner[key], f"{name}.{key}") for key in keys}
    if isinstance(value, list | tuple):
        return [_canonical(item, name) for item in value]
    raise TeacherUnusable(
        f"teacher.engine_args.{name}",
        found=repr(value)[:200],
        wanted="a value that JSON can hold: text, a finite number, true, false, null, a list or a mapping",
        fix="write it as one of these",
    )


def _portable(text: str) -> str:
    """`text`, or for a local path its last part: the folder of one machine is no fact of the dataset."""
    text = _SECRET_TEXT.sub("", text)
    if text.startswith(("/", "~", "./", "../", "file://")):
        text = f"{Path(text.rstrip('/')).name} (a local path)"
    if len(text) > _MAX_TEXT:
        text = f"sha256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"
    return text
