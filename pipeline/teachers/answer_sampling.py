"""Samples answers: next token, random numbers, stop texts, and the sequence that results.

The last token of an answer is the one that ended it: the end of turn, or the token that completed a stop text. It is a
target like the others. Shape letter: `V` token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from coldstill.common.rng import to_uniforms
from coldstill.pipeline.config import SamplingConfig
from coldstill.pipeline.teachers.protocol import TokenSequence, answer_name
from coldstill.storage_schema.errors import InvalidRow
from coldstill.storage_schema.header import DatasetHeader

if TYPE_CHECKING:
    import transformers

_SLACK = 4
"""Tokens decoded beyond those that a stop text can take: the first of a piece may lose a space or be part of a
character."""


def answer_room(
    prompt: TokenSequence, *, sampling: SamplingConfig, header: DatasetHeader, tokens: int | None = None
) -> int:
    """The maximum number of tokens of an answer. Raises `InvalidRow` for a prompt that is empty or leaves no room.

    `tokens`: those of the prompt as the engine computes it, with its images expanded. The row has these images too.
    """
    read = prompt.token_ids.size if tokens is None else tokens
    stored = read + prompt.as_stored.token_ids.size - prompt.token_ids.size
    bounds = {"max_read_length": (read, header.about.max_read_length or header.max_length)} if prompt.stored else {}
    bounds["max_length"] = (stored, header.max_length)
    for key, (size, most) in bounds.items():
        if not 0 < size < most:
            raise InvalidRow(
                f"prompt {prompt.sample_id!r}",
                found=f"{size} tokens",
                wanted=f"1..{most - 1}, so that teacher.{key} leaves room for an answer",
            )
    return min(sampling.max_tokens, *(most - size for size, most in bounds.values()))


def answer_sequence(
    prompt: TokenSequence, tokens: Sequence[int], *, number: int, answers: int, finish_reason: str
) -> TokenSequence:
    """Prompt and answer as one sequence, with all tokens of the answer as targets.

    `finish_reason`: `stop` or `length`.
    """
    first = prompt.token_ids.size
    return TokenSequence(
        sample_id=answer_name(prompt.sample_id, number, answers=answers),
        source_row=prompt.source_row,
        token_ids=np.concatenate([prompt.token_ids, np.asarray(tokens, np.int32)]),
        target_spans=np.array([[first - 1, first + len(tokens) - 1]], np.int32),
        metadata={**prompt.metadata, "finish_reason": finish_reason},
        media=prompt.media,
        stored=prompt.stored.answered(tokens) if prompt.stored else None,
    )


def next_token(logits: np.ndarray, *, temperature: float, top_p: float, uniform: float) -> int:
    """A token from `logits float [V]` by one number `uniform` of [0, 1).

    Temperature 0 takes the most probable token, the lowest id of equals. Otherwise the softmax of `logits /
    temperature` is cut to its most probable tokens of mass `top_p` (Holtzman et al., arXiv 1904.09751), and the token
    is where the cumulative sum passes `uniform` times that mass. In float64: the error of a float32 sum over 150,000
    entries exceeds the weight of many of them.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    if top_p == 1:
        return _inverse_cdf(weights, uniform)
    kept = top_p_set(weights / weights.sum(), top_p)
    return int(kept[_inverse_cdf(weights[kept], uniform)])


def top_p_set(probs: np.ndarray, top_p: float) -> np.ndarray:
    """`int64 [n]`, n >= 1: the fewest most probable ids of `probs float64 [V]` whose mass is at least `top_p`, most
    probable first, ties by id."""
    order = np.argsort(-probs, kind="stable")
    reached = int(np.searchsorted(np.cumsum(probs[order]), top_p))
    return order[: reached + 1]


def answer_uniforms(*, seed: int, sample_id: str, number: int, count: int) -> np.ndarray:
    """`float64 [count]` in [0, 1): the numbers that answer `number` to a prompt is sampled with, one per token.

    Philox4x64-10 as for the tail draws, with a separate key: the tail draws of an answer must not follow its tokens.
    """
    key = np.array([seed, _answer_key(sample_id, number)], np.uint64)
    return to_uniforms(np.random.Philox(key=key).random_raw(count))


def answer_seed(*, seed: int, sample_id: str, number: int) -> int:
    """The seed of one answer, below 2^63, for engines that have their own sampler."""
    return (_answer_key(sample_id, number) >> 1) ^ seed


def padding_bias(header: DatasetHeader) -> dict[int, float] | None:
    """What is added to the logit of each id that the tokenizer does not have, for engines that have their own sampler.

    -100 is the least that vLLM takes: a factor of 4e-44. None if the head has no such column.
    """
    return dict.fromkeys(range(header.token_count, header.vocab_size), -100.0) or None


class StopTexts:
    """Whether the newest token of an answer completes one of `texts`. Special tokens count as text."""

    def __init__(self, texts: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase):
        self._texts, self._tokenizer = tuple(filter(None, texts)), tokenizer
        # Special tokens are decoded too, so each token is at least a byte of the text.
        self._window = _SLACK + max((len(text.encode()) for text in self._texts), default=0)

    def end(self, tokens: Sequence[int]) -> bool:
        """Whether the answer ends here. `tokens`: the answer so far; call it after each token."""
        if not self._texts:
            return False
        text = self._tokenizer.decode(tokens[-self._window :], clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._texts)


def _answer_key(sample_id: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"answer {number}\n{sample_id}".encode()).digest()[:8], "little")


def _inverse_cdf(weights: np.ndarray, uniform: float) -> int:
    cumulative = np.cumsum(weights)
    # A rounding of the product must not step past the last entry that has any weight.
    depth = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(np.searchsorted(cumulative, depth, side="right"))
