"""Distributions of other tokens, and values of another kind, are refused; all right ones are imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.errors import AlignmentDoubtful, NotFullSoftmax, UnusableRow
from coldstill.tools.exchange.derived_targets import derived_targets
from coldstill.tools.exchange.plausibility import votes_of_all
from tests.tools.exchange import peers
from tests.tools.exchange.doubtful_captures import K, run, written

# ---- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "layout"),
    [*((offset, "axolotl") for offset in (-4, -3, -2, -1, 0, 2, 3, 4, 5, 9)), (-1, "plain"), (3, "plain")],
)
def test_distributions_of_any_other_token_are_refused(
    offset: int, layout: str, texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    shifted = [peers.Sequence(one.tokens, np.roll(one.logprobs, 1 - offset, axis=0)) for one in texts]
    source = written(tmp_path / "in", shifted, lambda values: values, layout=layout)
    with pytest.raises(AlignmentDoubtful) as caught:
        run(source, tmp_path / "out", wide_tokenizer, layout=layout)
    # Only what was tried on the sample is advised: another `predicts` mends no shift but that of one token.
    assert ("--predicts" in str(caught.value)) == (layout == "axolotl" and offset == 2)
    if offset != 9:
        with pytest.raises(AlignmentDoubtful):
            run(source, tmp_path / "out", wide_tokenizer, layout=layout, assume_aligned=True)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    vocabulary=st.integers(30, 200),
    top_k=st.integers(1, 12),
    offset=st.integers(-4, 5) | st.integers(7, 30),
    length=st.sampled_from([8, 20, 40]),
)
def test_no_other_offset_passes_at_any_size(seed: int, vocabulary: int, top_k: int, offset: int, length: int) -> None:
    rows = []
    for text in peers.sequences(-(-320 // length), seed=seed, vocabulary=vocabulary, length=length + 31):
        # The target at t has the distribution of token t + offset, or of one before the text.
        places = np.arange(length)
        source = (places + offset - 1) % len(text.tokens)
        ids = np.argsort(-text.logprobs[source], axis=1, kind="stable")[:, :top_k]
        targets = derived_targets(
            ids,
            np.take_along_axis(text.logprobs[source], ids, axis=1),
            present=np.ones(ids.shape, bool),
            labels=text.tokens[places + 1],
            token_count=vocabulary,
            top_k=top_k,
        )
        tokens = text.tokens[: length + 1].astype(np.int32)
        spans = np.array([[0, length]], np.int32)
        rows.append(CachedRow(sample_id="a", token_ids=tokens, target_spans=spans, targets=targets))
    assert votes_of_all(rows).is_clear == (offset == 1)


@pytest.mark.parametrize("predicts", [None, "next", "same"])
def test_answers_that_were_cut_and_given_an_end_are_refused_with_every_setting(
    predicts: str | None, texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = []
    for text in texts:
        row = peers.raw_row(text, K, version=2, answer=30)
        row["input_ids"] = [*row["input_ids"], 198, 199]  # <|im_end|> and a line break
        rows.append(row)
    source = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(AlignmentDoubtful) as caught:
        run(source, tmp_path / "out", wide_tokenizer, predicts=predicts)
    assert "--predicts" not in str(caught.value)
    assert "after it was scored" in str(caught.value)


def test_a_setting_that_is_advised_is_one_that_works(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = [peers.prepared_row(one, K, predicts="same") for one in texts]
    for row in rows:
        del row["labels"]
    source = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(AlignmentDoubtful, match="--predicts same"):
        run(source, tmp_path / "out", wide_tokenizer)
    assert len(run(source, tmp_path / "out", wide_tokenizer, predicts="same")) == len(texts)


def test_rows_that_are_shifted_among_right_ones_are_refused_or_rejected(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(60, length=90)
    mixed = [
        peers.Sequence(one.tokens, np.roll(one.logprobs, 2, axis=0)) if n % 10 == 9 else one
        for n, one in enumerate(texts)
    ]
    source = written(tmp_path / "in", mixed, lambda values: values, layout="axolotl")
    with pytest.raises(UnusableRow, match=r"in-9: alignment"):
        run(source, tmp_path / "out", wide_tokenizer)
    dataset = run(source, tmp_path / "out", wide_tokenizer, bad_rows="reject")
    assert (len(dataset), dataset.manifest.rejected) == (54, 6)


def test_short_rows_that_are_shifted_among_right_ones_end_the_import(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(400, length=24)
    mixed = [
        peers.Sequence(one.tokens, np.roll(one.logprobs, 2, axis=0)) if n % 5 == 4 else one
        for n, one in enumerate(texts)
    ]
    source = written(tmp_path / "in", mixed, lambda values: values, layout="axolotl")
    with pytest.raises(AlignmentDoubtful, match="rows predict token t - 1"):
        run(source, tmp_path / "out", wide_tokenizer, rows_per_unit=50)


def test_answers_of_a_single_token_are_judged_together(tmp_path: Path, wide_tokenizer: Path) -> None:
    texts = peers.sequences(120, length=12)
    rows = [peers.raw_row(one, K, version=2, answer=1) for one in texts]
    source = peers.write_jsonl(tmp_path / "in.jsonl", rows)
    assert len(run(source, tmp_path / "out", wide_tokenizer)) == 120
    ended = [{**row, "input_ids": [*row["input_ids"], 199]} for row in rows]
    with pytest.raises(AlignmentDoubtful):
        run(peers.write_jsonl(tmp_path / "ended.jsonl", ended), tmp_path / "no", wide_tokenizer)


def test_a_text_of_one_repeated_token_shows_nothing_and_is_stated(tmp_path: Path, wide_tokenizer: Path) -> None:
    logits = np.zeros((60, peers.VOCABULARY))
    logits[:, 7] = 5
    text = peers.Sequence(np.full(60, 7), logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    source = written(tmp_path / "in", [text] * 3, lambda values: values, layout="axolotl")
    with pytest.raises(AlignmentDoubtful, match="--assume-aligned"):
        run(source, tmp_path / "out", wide_tokenizer)
    assert len(run(source, tmp_path / "out", wide_tokenizer, assume_aligned=True)) == 3


# ---- other assumptions -----------------------------------------------------------------------------------------------


def mistakes() -> dict[str, tuple[Callable[[np.ndarray], np.ndarray], type[Exception], str]]:
    """Values that are not natural log-probs of the full softmax: the change, and the error with words of it."""
    return {
        "base 2": (lambda values: values / math.log(2), NotFullSoftmax, "powers of 2"),
        "base 10": (lambda values: values / math.log(10), NotFullSoftmax, "base 10"),
        "probabilities": (np.exp, NotFullSoftmax, "natural logarithm of these probabilities"),
        "logits": (lambda values: values + 9, NotFullSoftmax, "normalizer"),
        "logits below their largest": (lambda v: v - v.max(axis=1, keepdims=True), NotFullSoftmax, "normalizer"),
        "logits far below": (lambda values: values - 20, NotFullSoftmax, "less than K"),
        "zeros": (np.zeros_like, NotFullSoftmax, "normalizer"),
        "NaN": (lambda values: np.full_like(values, np.nan), UnusableRow, "NaN"),
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_values_of_another_kind_are_refused_by_name(
    mistake: str, texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    change, error, words = mistakes()[mistake]
    source = written(tmp_path / "in", texts, change, layout="axolotl")
    with pytest.raises(error, match=words):
        run(source, tmp_path / "out", wide_tokenizer)


def test_ids_of_another_tokenizer_are_refused(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    other = [peers.Sequence((one.tokens + 3) % peers.VOCABULARY, one.logprobs) for one in texts]
    source = written(tmp_path / "in", other, lambda values: values, layout="axolotl")
    with pytest.raises(AlignmentDoubtful, match="which tokenizer"):
        run(source, tmp_path / "out", wide_tokenizer)


def test_a_second_bos_and_entries_in_any_order_change_nothing(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = [peers.raw_row(one, K, version=2, answer=59) for one in texts]
    for row in rows:
        row["input_ids"] = [0, *row["input_ids"]]
        row["logprobs"] = [values[::-1] for values in row["logprobs"]]
        row["target_token_ids"] = [ids[::-1] for ids in row["target_token_ids"]]
    dataset = run(peers.write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", wide_tokenizer)
    for text, row in zip(texts, dataset.rows(), strict=True):
        assert row.positions.tolist() == list(range(1, 60))
        assert set(row.targets.ids[5].tolist()) == set(peers.top(text.logprobs[5], K)[0])


def test_the_entry_that_vllm_adds_for_the_real_token_is_not_one_of_the_top_k(
    texts: list[peers.Sequence], tmp_path: Path, wide_tokenizer: Path
) -> None:
    rows = []
    for text in texts:
        row = peers.raw_row(text, K, version=2, answer=59)
        for t in range(59):
            token = int(text.tokens[t + 1])
            if token not in row["target_token_ids"][t]:
                row["target_token_ids"][t].append(token)
                row["logprobs"][t].append(float(text.logprobs[t, token]))
        rows.append(row)
    dataset = run(peers.write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out", wide_tokenizer)
    assert dataset.header.top_k == K
