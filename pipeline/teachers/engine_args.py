"""What of a teacher's engine decides the values of a dataset, for its header: arguments, and quantized weights.

The header is made before an engine is loaded, so its quantization is what `config.json` and `teacher.engine_args`
state; the engine that has loaded the weights then compares.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from coldstill.common.plugins import is_plugin
from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable

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
        mm_encoder_tp_mode mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_hasher_algorithm
        mm_tensor_ipc mm_ipc_gpu_memory_gb skip_mm_profiling disable_chunked_mm_input enable_mm_processor_stats
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


_KERNELS = re.compile(r"^auto_(?=awq|gptq)|_(marlin|bitblas)$")
_FAMILIES = {
    "online": "fp8",
    "fp8_per_tensor": "fp8",
    "fp8_per_block": "fp8",
    "fp8_per_channel": "fp8",
    "deepseek_v4_fp8": "fp8",
    "finegrained_fp8": "fp8",
    "gpt_oss_mxfp4": "mxfp4",
    "auto-round": "inc",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
}
"""Names of one way to store weights: an engine's name says which kernels read them too."""
_ANY_KERNEL = frozenset(("moe_wna16", "humming"))
"""Kernels of vLLM that read weights of several families."""


def quantization_of(config: TeacherConfig, model_config: Any) -> str | None:
    """Name of the weights' quantization: the one set for the engine, or the one that they are stored in."""
    arguments = config.engine_args
    if configured := arguments.get("quantization"):
        return str(configured)
    settings = arguments.get("quantization_config")
    if isinstance(settings, Mapping) and config.engine == "transformers":
        return _method(settings) or "bitsandbytes"
    if arguments.get("gguf_file") or arguments.get("load_format") == "gguf":
        return "gguf"
    if arguments.get("load_format") == "bitsandbytes":
        return "bitsandbytes"
    overrides = arguments.get("hf_overrides")
    if config.engine == "vllm" and isinstance(overrides, Mapping) and "quantization_config" in overrides:
        return _method(overrides["quantization_config"])
    return stored_quantization(model_config)


def stored_quantization(model_config: Any) -> str | None:
    """Name of the quantization that a `config.json` states, also beside the settings of its language model."""
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    for part in (model_config, text_config):
        for name in ("quantization_config", "compression_config"):
            if found := _method(getattr(part, name, None)):
                return found
    return None


def require_loaded(
    config: TeacherConfig, *, recorded: str | None, loaded: str | None, layers: int | None = None
) -> None:
    """Raise `TeacherUnusable` unless the engine has `loaded` what the header has `recorded`.

    `layers`: the number of its layers that are quantized, if it can be counted. transformers can dequantize weights,
    which keeps their values: `loaded` is then None.
    """
    is_dequantized = loaded is None and recorded is not None and config.engine == "transformers"
    same = is_dequantized or _family(loaded) == _family(recorded) or (recorded and loaded in _ANY_KERNEL)
    if same and (layers is None or bool(layers) == (recorded is not None)):
        return
    counted = "" if layers is None else f" in {layers} layers"
    raise TeacherUnusable(
        f"quantization of {config.model} in engine {config.engine}",
        found=f"{loaded or 'none'}{counted}",
        wanted=f"{recorded or 'none'}, which config.json and teacher.engine_args state and the header records",
        fix="set teacher.engine_args.quantization (vLLM) or .quantization_config (transformers) to what the weights "
        "are stored in, and choose another output",
    )


def loaded_quantization(model: Any) -> str | None:
    """Name of the quantization of a model of transformers; None also after it was dequantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    return _method(getattr(quantizer, "quantization_config", None)) or stored_quantization(model.config)


def _family(name: str | None) -> str | None:
    if name is None:
        return None
    plain = _KERNELS.sub("", _KERNELS.sub("", name.lower()))
    return "modelopt" if plain.startswith("modelopt") else _FAMILIES.get(plain, plain)


def _method(settings: object) -> str | None:
    """`quant_method` of settings, a mapping or an object of transformers."""
    if settings is None:
        return None
    known = settings if isinstance(settings, Mapping) else vars(settings)
    found = known.get("quant_method")
    if found is None and (known.get("producer") or {}).get("name") == "modelopt":
        return "modelopt"
    found = getattr(found, "value", found)
    return str(found).lower().replace("compressed_tensors", "compressed-tensors") if found else None
