"""The compatibility check: whether the tap fits this vLLM and its settings.

It runs before anything is wrapped. Signatures were the same in vLLM 0.28, 0.31, 0.32 and 0.33; the tests run 0.32. The
version number is not read: this check compares the names and signatures, and the self-check compares the values.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

_V1_STEP = ("hidden_states", "num_scheduled_tokens")
_V1_ATTRIBUTES = (
    "input_batch.req_ids",
    "query_start_loc.np",
    "requests",
    "model.compute_logits",
    "device",
    "model_config",
)
_V2_METHODS = {
    "add_request": ("req_id", "req_idx", "sampling_params"),
    "remove_request": ("req_id",),
    "compute_prompt_logprobs": (
        "logits_fn",
        "hidden_states",
        "input_batch",
        "all_token_ids",
        "num_computed_tokens",
        "prompt_lens",
    ),
}
_V2_ATTRIBUTES = ("model.compute_logits", "device", "model_config")

_WRONG_POSITIONS = {
    "speculative_config": (None, "several logit rows belong to one token under speculative decoding"),
    "kv_transfer_config": (None, "positions in another engine's cache are never computed"),
    "cache_config.kv_sharing_fast_prefill": (False, "it skips positions of the prompt"),
    "parallel_config.decode_context_parallel_size": (1, "positions are split over processes"),
    "parallel_config.prefill_context_parallel_size": (1, "positions are split over processes"),
    "parallel_config.data_parallel_size": (1, "each worker of the capture has its own engine"),
    "parallel_config.enable_dbo": (False, "a step is computed in two halves"),
    "parallel_config.use_ubatching": (False, "a step is computed in parts"),
}
"""Settings of vLLM under which its prompt log-probs, and the tap, would read wrong or partial rows."""


def problems_of_config(vllm_config: Any) -> Iterator[str]:
    """Settings that the tap does not support, as messages. A setting that a release lacks is not a problem."""
    for path, (wanted, reason) in _WRONG_POSITIONS.items():
        found = _attribute(vllm_config, path, default=wanted)
        if found != wanted:
            yield f"{path} is {found!r}, not {wanted!r}: {reason}"


def problems_of_runner(runner: Any, name: str) -> Iterator[str]:
    """Members of the model runner that the tap of runner `name` (v1, v2) uses and that are missing or differ."""
    is_v2 = hasattr(runner, "prompt_logprobs_worker")
    if is_v2 != (name == "v2"):
        yield f"vLLM chose model runner {'v2' if is_v2 else 'v1'}, and teacher.runner is {name}"
        return
    methods = (
        {f"prompt_logprobs_worker.{method}": names for method, names in _V2_METHODS.items()}
        if is_v2
        else {"_get_prompt_logprobs_dict": _V1_STEP}
    )
    for path, names in methods.items():
        method = _attribute(runner, path, default=None)
        found = tuple(inspect.signature(method).parameters) if callable(method) else None
        if found != names:
            yield f"{type(runner).__name__}.{path} takes {found}, not {names}"
    for path in _V2_ATTRIBUTES if is_v2 else _V1_ATTRIBUTES:
        if _attribute(runner, path, default=None) is None:
            yield f"{type(runner).__name__} has no {path}"


def _attribute(root: Any, path: str, *, default: Any) -> Any:
    for name in path.split("."):
        if not hasattr(root, name):
            return default
        root = getattr(root, name)
    return root
