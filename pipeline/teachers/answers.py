"""What an answer is, whatever the engine: its name, its targets, where it ends.

A prompt in, a sequence of prompt and answer out. The answer's last token is the one that ended it: the end of turn, or
the token that completed a stop text; it is a target like the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import transformers

from coldstill.pipeline.config import SamplingConfig
from coldstill.pipeline.sequences import TokenSequence
from coldstill.storage_schema.errors import InvalidRow
from coldstill.storage_schema.header import DatasetHeader

_SLACK = 4
"""Tokens that are decoded beside those that a stop text can take: the first of a piece may lose a space or be half a
character."""


def answer_name(sample_id: str, number: int, *, answers: int) -> str:
    """Sample id of answer `number` of `answers` to a prompt."""
    return sample_id if answers == 1 else f"{sample_id}#{number}"


def answer_room(prompt: TokenSequence, *, sampling: SamplingConfig, header: DatasetHeader) -> int:
    """The most tokens of an answer. Raises `InvalidRow` for a prompt that is empty or leaves no room."""
    if not 0 < prompt.token_ids.size < header.max_length:
        raise InvalidRow(
            f"prompt {prompt.sample_id!r}",
            found=f"{prompt.token_ids.size} tokens",
            wanted=f"1..{header.max_length - 1}, so that teacher.max_length leaves room for an answer",
        )
    return min(sampling.max_tokens, header.max_length - prompt.token_ids.size)


def answer_sequence(
    prompt: TokenSequence, tokens: Sequence[int], *, number: int, answers: int, finish_reason: str
) -> TokenSequence:
    """Prompt and answer, all of the answer's tokens targets. `finish_reason`: `stop` or `length`."""
    first = prompt.token_ids.size
    return TokenSequence(
        sample_id=answer_name(prompt.sample_id, number, answers=answers),
        source_row=prompt.source_row,
        token_ids=np.concatenate([prompt.token_ids, np.asarray(tokens, np.int32)]),
        target_spans=np.array([[first - 1, first + len(tokens) - 1]], np.int32),
        metadata={**prompt.metadata, "finish_reason": finish_reason},
    )


class StopTexts:
    """Whether the newest token of an answer completes one of `texts`, special tokens written out."""

    def __init__(self, texts: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase):
        self._texts, self._tokenizer = tuple(filter(None, texts)), tokenizer
        # Without special tokens left out, each token is at least a byte of the text.
        self._window = _SLACK + max((len(text.encode()) for text in self._texts), default=0)

    def end(self, tokens: Sequence[int]) -> bool:
        """`tokens`: the answer so far. To be asked after each of them."""
        if not self._texts:
            return False
        text = self._tokenizer.decode(tokens[-self._window :], clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._texts)
