"""The KL that storage costs is within the header's guarantee: on distributions of real text, and on any other.

The teacher here is a word model of this interpreter's own library: bigram counts smoothed by unigram counts.
"""

from __future__ import annotations

import pydoc_data.topics
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from coldstill.storage_schema.codec import RowCodec
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.rows import TeacherTargets
from tests import making, reference


@cache
def _text_distributions() -> np.ndarray:
    """`float64 [N, V]`: what follows a word, for 400 words in a row."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    vocabulary = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    ids = np.array([vocabulary[word] for word in words])
    unigram = np.bincount(ids) / ids.size
    rows = []
    for word in ids[5000:5400]:
        follows = np.bincount(ids[1:][ids[:-1] == word], minlength=unigram.size)
        rows.append((follows + 5 * unigram) / (follows.sum() + 5))
    return np.stack(rows)


def _kl(probs: np.ndarray, codec: RowCodec) -> np.ndarray:
    labels = np.zeros(len(probs), np.int32)
    top_k = codec.header.top_k
    ids = np.argsort(-probs, axis=1)[:, :top_k].astype(np.int32)
    logs = np.log(np.take_along_axis(probs, ids, 1))
    tail = np.maximum(probs.sum(1) - np.exp(logs).sum(1), 1e-30)
    targets = TeacherTargets(
        ids=ids,
        logprobs=logs.astype(np.float32),
        counts=np.full(len(probs), top_k, np.int32),
        log_tail=np.log(tail).astype(np.float32),
        label_logprob=np.log(probs[:, 0]).astype(np.float32),
        draw_ids=np.empty(0, np.int32),
        draw_counts=np.zeros(len(probs), np.int32),
    )
    return np.array(reference.storage_kl(targets, codec.decode(codec.encode(targets, labels=labels), labels=labels)))


def _codec(tokenizer: Path, fidelity: str, top_k: int, vocabulary: int) -> RowCodec:
    codec = Codec.preset(fidelity, top_k=top_k)  # type: ignore[arg-type]
    header: DatasetHeader = making.tiny_header(
        tokenizer, top_k=top_k, draws=0, vocab_size=vocabulary, token_count=vocabulary, codec=codec
    )
    return RowCodec(header)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("top_k", [1, 8, 64, 300])
@pytest.mark.parametrize("fidelity", ["fine", "coarse", "exact"])
def test_real_text_is_stored_within_the_guarantee(
    tokenizer_folder: Path, fidelity: str, top_k: int, temperature: float
) -> None:
    probs = _text_distributions() ** (1 / temperature)
    probs /= probs.sum(1, keepdims=True)
    codec = _codec(tokenizer_folder, fidelity, top_k, probs.shape[1])
    assert _kl(probs, codec).mean() < codec.header.codec.mean_kl


@pytest.mark.parametrize("fidelity", ["fine", "coarse", "exact"])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 16, 200])
def test_any_distribution_is_stored_within_the_guarantee(
    tokenizer_folder: Path, fidelity: str, sharpness: float, top_k: int
) -> None:
    """From flat, where every entry costs what it can, to nearly one-hot; mean of 1,000 positions, within the error of
    that mean."""
    rng = np.random.default_rng(1)
    probs = making.random_probs(rng, 1000, 400, sharpness=sharpness)
    codec = _codec(tokenizer_folder, fidelity, top_k, 400)
    kl = _kl(probs, codec)
    assert kl.mean() - 2 * kl.std() / np.sqrt(kl.size) < codec.header.codec.mean_kl


@pytest.mark.parametrize("top_k", [1, 2, 16, 200])
@pytest.mark.parametrize("fidelity", ["fine", "coarse", "exact"])
def test_no_position_costs_more_than_three_times_the_guarantee(
    tokenizer_folder: Path, fidelity: str, top_k: int
) -> None:
    """Errors of half a step all over, instead of errors spread over it: where all values lie within one step."""
    for sharpness in (0.0, 0.001, 0.01, 0.1, 3.0):
        probs = making.random_probs(np.random.default_rng(2), 300, 400, sharpness=sharpness)
        codec = _codec(tokenizer_folder, fidelity, top_k, 400)
        assert _kl(probs, codec).max() < 3 * codec.header.codec.mean_kl
