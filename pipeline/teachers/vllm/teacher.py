"""The vLLM engine by its public path: `prompt_logprobs` give K entries, a derived tail and no draws.

The one file that imports vLLM.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from typing import Any

from pipeline.config import SamplingConfig, TeacherConfig
from pipeline.errors import TeacherUnusable
from pipeline.sequences import TokenSequence
from storage_schema.header import DatasetHeader
from storage_schema.rows import TeacherTargets

from .public_path import read_prompt_logprobs

_REFUSED = {
    "speculative_config": "prompt log-probs are wrong under speculative decoding",
    "enable_prefix_caching": "positions in a cached prefix are never computed",
    "max_logprobs": "it follows teacher.top_k",
    "logprobs_mode": "the log-probs are those of the raw logits",
    "model": "it is teacher.model",
}


class VllmTeacher:
    """vLLM in this process. Takes and gives what `protocol.Teacher` says."""

    def __init__(self, config: TeacherConfig, header: DatasetHeader, sampling: SamplingConfig | None = None):
        for name, reason in _REFUSED.items():
            if name in config.engine_args:
                raise TeacherUnusable(
                    f"teacher.engine_args.{name}",
                    found=config.engine_args[name],
                    wanted="nothing",
                    fix=f"remove it: {reason}",
                )
        arguments = _engine_arguments(config)
        _set_environment(arguments)
        try:
            import vllm
        except ImportError as error:
            raise TeacherUnusable(
                "teacher.engine vllm",
                found=str(error),
                wanted="vLLM",
                fix='pip install "coldstill[capture]" (GPU) or "coldstill[capture-cpu]" on each node',
            ) from error

        self._config, self._header, self._vllm = config, header, vllm
        try:
            self._engine = vllm.LLM(**arguments)
        except (ValueError, OSError) as error:
            raise TeacherUnusable(
                f"teacher.model {config.model}",
                found=" ".join(str(error).split())[:600],
                wanted="a model and engine_args that vLLM takes",
            ) from error
        self._sampling = vllm.SamplingParams(
            prompt_logprobs=config.top_k, max_tokens=1, temperature=0, flat_logprobs=True, detokenize=False
        )

    @property
    def environment(self) -> dict[str, Any]:
        """See `protocol.Teacher`."""
        import torch

        return {"engine": "vllm", "vllm": self._vllm.__version__, "torch": torch.__version__, "device": _device()}

    def score(self, sequences: Sequence[TokenSequence]) -> list[TeacherTargets]:
        """See `protocol.Teacher`. `LLM.generate` queues all requests before the engine's first step."""
        prompts = [{"prompt_token_ids": sequence.token_ids.tolist()} for sequence in sequences]
        outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        return [
            read_prompt_logprobs(
                output.prompt_logprobs,
                sequence,
                top_k=self._config.top_k,
                min_prob=self._config.min_prob,
                token_count=self._header.token_count,
            )
            for output, sequence in zip(outputs, sequences, strict=True)
        ]


def _engine_arguments(config: TeacherConfig) -> dict[str, Any]:
    """Arguments of vLLM's LLM class; what the user gave wins where it is not refused above."""
    parallel = config.engine_args.get("tensor_parallel_size", 1) * config.engine_args.get("pipeline_parallel_size", 1)
    return {
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        # vLLM demands room for one sampled token after the prompt.
        "max_model_len": config.max_length + 1,
        "max_logprobs": config.top_k,
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": False,
        # Inside a Ray placement group vLLM would choose Ray by itself, and wait for the GPUs that this actor holds.
        "distributed_executor_backend": "uni" if parallel == 1 else "mp",
        "enforce_eager": not _can_compile(),
        "seed": 0,
        **config.engine_args,
    }


def _set_environment(arguments: dict[str, Any]) -> None:
    """What vLLM reads from the environment at import; what the user set stays."""
    # In one process the engine dies with its worker and cannot hang it; several GPUs need processes of their own.
    one_process = arguments["distributed_executor_backend"] == "uni"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if one_process else "1")
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


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
