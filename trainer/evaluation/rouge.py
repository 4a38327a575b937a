"""ROUGE-L of a student's greedy answers: a model, its tokenizer and a dataset come in, one number goes out.

As the TAID repository validates (its `src/metrics.py`): greedy answers of at most 512 tokens, F1 of the longest common
subsequence of words with stemming, by Google's `rouge_score`, times 100. It reports the median of bootstrap means; here
it is the mean itself.
"""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from coldstill.common.packages import require_packages
from coldstill.storage_schema.dataset import Dataset

from .answers import greedy_answers, questions

MAX_NEW_TOKENS = 512


def require_rouge() -> None:
    """Raise `PackagesMissing` where the library is not installed."""
    require_packages("eval", "rouge_score")


def rouge_l(
    model: Any, tokenizer: Any, dataset: Dataset, *, rows: int, batch_size: int, max_new_tokens: int = MAX_NEW_TOKENS
) -> float:
    """Mean ROUGE-L F1, from 0 to 100, over the first `rows` rows of `dataset` that have a prompt and an answer.

    `tokenizer` is transformers'; special tokens are no part of an answer. Raises `PackagesMissing`, `NoAnswers`.
    """
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    asked = questions(dataset, limit=rows)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = greedy_answers(model, asked, pad_id=pad_id, batch_size=batch_size, max_new_tokens=max_new_tokens)
    total = 0.0
    for question, answer in zip(asked, tqdm(answers, desc="answers", total=len(asked), disable=None), strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (question.reference.tolist(), answer)]
        total += scorer.score(*texts)["rougeL"].fmeasure
    return 100 * total / len(asked)
