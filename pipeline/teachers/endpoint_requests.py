"""What is asked of a server's completions endpoint: the fields beside model and prompt. endpoint_payload.py reads the
answers."""

from __future__ import annotations

from typing import Any

from coldstill.pipeline.config import SamplingConfig


def score_fields(top_k: int) -> dict[str, Any]:
    """For the log-probs of the prompt; a server insists on answering one token, which is not read."""
    return {"prompt_logprobs": top_k, "max_tokens": 1, "temperature": 0}


def answer_fields(top_k: int, *, sampling: SamplingConfig, room: int, seed: int) -> dict[str, Any]:
    """For an answer of at most `room` tokens, with log-probs by token id."""
    return {
        "max_tokens": room,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
        "stop": [text for text in sampling.stop if text],
        "skip_special_tokens": False,  # a stop text may be one
        "logprobs": top_k,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # A server's own defaults, from the model's generation config, would change what is sampled.
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }
