"""The floor of every tap, inside vLLM's worker: prefill, then head, top K and log-sum-exp with results discarded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.teachers.vllm.engine import Engine, Request

_KEY = "floor"
_BLOCK_BYTES = 32 << 20  # the tap's


def install_floor(engine: Engine) -> None:
    """Install the floor beside the tap in a worker of this process. Each request selects one of them."""
    engine.call_workers(_install)  # type: ignore[arg-type]


def run_requests(engine: Engine, sequences: Sequence[TokenSequence], *, top_k: int | None) -> None:
    """Prefill the sequences. With `top_k`, also score all positions and discard the result."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        skip_reading_prefix_cache=True,
        extra_args=None if top_k is None else {_KEY: top_k},
    )
    engine.run([Request(sequence.token_ids.tolist(), parameters) for sequence in sequences])


def _install(worker: Any) -> None:
    runner = worker.model_runner
    original = runner._get_prompt_logprobs_dict

    def step(hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        result = original(hidden_states, num_scheduled_tokens)
        wanted = [
            (runner.requests[name].sampling_params.extra_args or {}).get(_KEY) for name in runner.input_batch.req_ids
        ]
        if wanted and wanted[0]:
            head = runner.model.compute_logits
            rows = max(16, _BLOCK_BYTES // (8 * runner.model_config.get_vocab_size()))
            for start in range(0, len(hidden_states), rows):
                logits = head(hidden_states[start : start + rows])
                torch.topk(logits, wanted[0], dim=-1)
                torch.logsumexp(logits, -1)
        return result

    runner._get_prompt_logprobs_dict = step
