"""What vLLM is started with: the capture's settings in, arguments and environment out. Imports nothing of vLLM."""

from __future__ import annotations

import os
import sysconfig
from typing import Any

import torch

from coldstill.pipeline.config import TeacherConfig
from coldstill.pipeline.errors import TeacherUnusable
from coldstill.storage_schema.header import DatasetHeader

_REFUSED = {
    "speculative_config": "several logit rows belong to one token under speculative decoding",
    "max_logprobs": "it follows teacher.top_k",
    "logprobs_mode": "the log-probs are those of the raw logits",
    "worker_extension_cls": "it is the tap",
    "model": "it is teacher.model",
    "dtype": "it is teacher.dtype",
}


def engine_arguments(config: TeacherConfig, header: DatasetHeader) -> dict[str, Any]:
    """Arguments of vLLM's LLM class; what the user gave wins where it is not refused. Raises `TeacherUnusable`."""
    refused = dict(_REFUSED)
    if config.tap == "public" or header.order == "exact":
        refused["enable_prefix_caching"] = "positions in a cached prefix are never computed"
    for name, reason in refused.items():
        if name in config.engine_args:
            raise TeacherUnusable(
                f"teacher.engine_args.{name}",
                found=config.engine_args[name],
                wanted="nothing",
                fix=f"remove it: {reason}",
            )
    parallel = config.engine_args.get("tensor_parallel_size", 1) * config.engine_args.get("pipeline_parallel_size", 1)
    arguments: dict[str, Any] = {
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        # vLLM demands room for one sampled token after the prompt.
        "max_model_len": config.max_length + 1,
        # The canary asks the public path for as many.
        "max_logprobs": config.top_k,
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": False,
        # Inside a Ray placement group vLLM would choose Ray by itself, and wait for the GPUs that this actor holds.
        "distributed_executor_backend": "uni" if parallel == 1 else "mp",
        "enforce_eager": not _can_compile(),
        "seed": 0,
    }
    if header.order == "exact" or header.mode == "generate":
        # A step that runs ahead of its results hangs on timing, and the tap would not know the tokens of an answer yet.
        arguments["async_scheduling"] = False
    if header.mode == "generate" and not torch.cuda.is_available():
        # vLLM 0.32 on a CPU fails where a request with a seed of its own is prefilled in chunks.
        arguments["enable_chunked_prefill"] = False
    if config.tap == "worker":
        arguments["worker_extension_cls"] = "coldstill.pipeline.teachers.vllm.tap.TapExtension"
    if header.teacher.head_dtype != header.teacher.dtype:
        arguments["hf_overrides"] = {"head_dtype": header.teacher.head_dtype}
    return {**arguments, **config.engine_args}


def set_environment(config: TeacherConfig, arguments: dict[str, Any]) -> None:
    """What vLLM reads from the environment at import; what the user set stays."""
    # In one process the engine dies with its worker and cannot hang it; several GPUs need processes of their own.
    one_process = arguments["distributed_executor_backend"] == "uni"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if one_process else "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1" if config.runner == "v2" else "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # That one token may lie beyond the model's context: it is sampled and thrown away, never read.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    if not _can_compile():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _can_compile() -> bool:
    """torch.compile hands its include paths to the C++ compiler without quotes: a space in them makes it fail."""
    return not any(character.isspace() for character in sysconfig.get_path("purelib"))
