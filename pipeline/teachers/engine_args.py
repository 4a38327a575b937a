"""Which of `teacher.engine_args` decide the values of a dataset, and so belong to its header."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from coldstill.common.plugins import is_plugin
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
