"""ROUGE-L of a student's greedy answers to the prompts of a dataset.

Shape letters: `B` prompts, `T` tokens of the longest.

As in the TAID repository (`src/metrics.py`): greedy answers of at most 512 tokens, F1 of the longest common subsequence
of stemmed words by Google's `rouge_score`, times 100. The repository reports the median of bootstrap means; here it is
the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from coldstill.common.packages import require_packages
from coldstill.common.progress import tqdm
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.data.images import Placed, ReadRows, RowExpander, require_no_images
from coldstill.trainer.data.media import MediaReader
from coldstill.trainer.errors import NoAnswers
from coldstill.trainer.student.forward import innermost, model_inputs
from coldstill.trainer.student.images import images_of
from coldstill.trainer.student.positions import context_of, room_of, table_length

from .measured_model import measuring

MAX_NEW_TOKENS = 512


def require_rouge() -> None:
    """Raise `PackagesMissing` if the library is not installed."""
    require_packages("eval", "rouge_score")


def rouge_l(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    rows: int,
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    without_images: bool = False,
) -> float:
    """Mean ROUGE-L F1, from 0 to 100, over the first `rows` rows of `dataset` that have a prompt and an answer.

    `tokenizer` is one of transformers; special tokens are removed from answers. `without_images`: rows that have images
    are passed over. Raises `PackagesMissing`, `NoAnswers`, `StudentSeesNoImages`, and what `RowExpander.expand` raises.
    """
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    asked = questions(dataset, limit=rows, without_images=without_images)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = greedy_answers(
        model,
        asked,
        pad_id=pad_id,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        read=_reader_of_prompts(model, dataset),
    )
    total = 0.0
    for question, answer in zip(asked, tqdm(answers, desc="answers", total=len(asked), disable=None), strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (question.reference.tolist(), answer)]
        total += scorer.score(*texts)["rougeL"].fmeasure
    return 100 * total / len(asked)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Token ids of a prompt, `int32 [T]`, and of the reference answer. `row`: cut after the prompt, with the images in
    it."""

    sample_id: str
    prompt: np.ndarray
    reference: np.ndarray
    row: CachedRow | None = None


def questions(dataset: Dataset, *, limit: int, without_images: bool = False) -> list[Question]:
    """The questions of the first `limit` rows that have a prompt before their answer.

    A row's answer is its last run of target positions: the last turn, if the loss is on assistant tokens. All tokens
    before it are the prompt, as in the TAID repository. Raises `NoAnswers` if no row has a prompt.
    """
    rows = (row for row in dataset.rows() if not (without_images and row.media))
    found = list(islice(_questions(rows), limit))
    if not found:
        raise NoAnswers(
            f"dataset {dataset.store.url}",
            found=f"no row with a prompt before its answer; the loss is on {dataset.header.loss_on} tokens",
            wanted="chat rows with the loss on the assistant's tokens",
            fix="leave out --rouge for this dataset",
        )
    return found


def _questions(rows: Iterable[CachedRow]) -> Iterator[Question]:
    for row in rows:
        # Target position t predicts token t + 1: the first token of the answer is one after the span's start.
        start, stop = (int(edge) + 1 for edge in row.target_spans[-1])
        if start > 1:
            media = tuple(item for item in row.media if item.position < start)
            cut = replace(row, token_ids=row.token_ids[:start], media=media)
            answer = row.token_ids[start:stop]
            yield Question(sample_id=row.sample_id, prompt=cut.token_ids, reference=answer, row=cut)


def _reader_of_prompts(model: Any, dataset: Dataset) -> Callable[[Sequence[Question]], ReadRows | None]:
    """How `model` reads prompts; None for its result if it reads text alone."""
    images = images_of(model)
    expander = None if images is None else RowExpander(images)
    content = MediaReader(dataset, dataset.store).content

    def read(asked: Sequence[Question]) -> ReadRows | None:
        placed = [Placed(one.row, dataset.store.url, content) for one in asked if one.row is not None]
        if expander is not None:
            return expander.expand(placed)
        require_no_images(placed)
        return None

    return read


def greedy_answers(
    model: Any,
    asked: Sequence[Question],
    *,
    pad_id: int | None,
    batch_size: int,
    max_new_tokens: int,
    read: Callable[[Sequence[Question]], ReadRows | None] = lambda asked: None,
) -> Iterator[list[int]]:
    """New token ids of each answer, in order, by greedy decoding. `pad_id`: None if the tokenizer has no such id.

    An answer ends at the model's end token, after `max_new_tokens`, or at the end of the model's context. Prompts are
    padded on the left. `read`: how the model reads questions with images.
    """
    context = room_of(table_length(innermost(model)) or context_of(model.config), model)
    for start in range(0, len(asked), batch_size):
        taken = asked[start : start + batch_size]
        rows = read(taken)
        ids = [one.prompt for one in taken] if rows is None else [row.token_ids for row in rows.rows]
        prompts = [torch.from_numpy(one.astype(np.int64)) for one in ids]
        filler = 0 if pad_id is None else pad_id  # the mask hides it
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=filler, padding_side="left")
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = tokens.shape[1]
        room = max_new_tokens if context is None else max(1, min(max_new_tokens, context - width))
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        batch: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        if rows is not None:
            types = [torch.from_numpy(one) for one in rows.types]
            batch["token_types"] = torch.nn.utils.rnn.pad_sequence(types, batch_first=True, padding_side="left")
            batch["images"] = rows.images
        with measuring(model):
            grown = model.generate(
                **{name: value.to(model.device) for name, value in model_inputs(batch, model).items()},
                max_new_tokens=room,
                pad_token_id=pad_id,
                # Overrides generation_config.json: Qwen's sets a repetition penalty.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
            )
        yield from grown[:, width:].tolist()
