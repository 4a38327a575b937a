"""Answers of a student to a dataset's prompts: rows come in, prompts with references go out, and greedy answers.

Shape letters: `B` prompts, `T` tokens of the longest.

A row's answer is its last run of target positions: with the loss on assistant tokens, its last turn. All before it is
the prompt. (The TAID repository cuts its chats the same way.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.errors import NoAnswers

from .evaluate import measuring


@dataclass(frozen=True, kw_only=True)
class Question:
    """`prompt int32 [T]` token ids, and the ids of the `reference` answer."""

    sample_id: str
    prompt: np.ndarray
    reference: np.ndarray


def questions(dataset: Dataset, *, limit: int) -> list[Question]:
    """Of the first `limit` rows that have a prompt before their answer. Raises `NoAnswers` where there is none."""
    found = list(islice(_questions(dataset.rows()), limit))
    if not found:
        raise NoAnswers(
            f"dataset {dataset.store.url}",
            found=f"no row with a prompt before its answer; the loss is on {dataset.header.loss_on} tokens",
            wanted="rows of chats, with the loss on the assistant's tokens",
            fix="leave --rouge out for this dataset",
        )
    return found


def _questions(rows: Iterable[CachedRow]) -> Iterator[Question]:
    for row in rows:
        # Target position t is about token t + 1: the first answered token stands one behind the span's start.
        start, stop = (int(edge) + 1 for edge in row.target_spans[-1])
        if start > 1:
            yield Question(sample_id=row.sample_id, prompt=row.token_ids[:start], reference=row.token_ids[start:stop])


def greedy_answers(
    model: Any, asked: Sequence[Question], *, pad_id: int, batch_size: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """New token ids of each answer, in order, by greedy decoding up to the model's end token or `max_new_tokens`.

    Padded on the left; an answer ends where the model's context does.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for start in range(0, len(asked), batch_size):
        prompts = [torch.from_numpy(one.prompt.astype(np.int64)) for one in asked[start : start + batch_size]]
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left")
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = tokens.shape[1]
        room = max_new_tokens if context is None else max(1, min(max_new_tokens, context - width))
        with measuring(model):
            grown = model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=(torch.arange(width) >= width - lengths[:, None]).long().to(model.device),
                max_new_tokens=room,
                pad_token_id=pad_id,
                # Plain greedy decoding, whatever the model's own settings are: Qwen's bring a penalty of repetitions.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
            )
        yield from grown[:, width:].tolist()
