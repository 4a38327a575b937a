"""Greedy answers and their ROUGE-L: where prompts end, that padding changes nothing, and the score's definition."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from coldstill.common.packages import PackagesMissing
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.errors import NoAnswers
from coldstill.trainer.evaluation.rouge import greedy_answers, questions, rouge_l
from tests import making
from tests.trainer.evaluation import reference
from tests.trainer.evaluation.batches import load

V = making.VOCABULARY


def write_chats(root: Path, tokenizer: Path, spans: list[list[tuple[int, int]]]) -> Dataset:
    """A dataset of a row of random letters for each list of target spans, which end where the last one does."""
    rng = np.random.default_rng(0)
    rows = []
    for n, edges in enumerate(spans):
        tokens = rng.integers(2, V, edges[-1][1] + 1, dtype=np.int32)
        positions = np.concatenate([np.arange(*edge) for edge in edges])
        probs = making.random_probs(rng, positions.size, V)
        targets = making.targets_of(probs, tokens[positions + 1], top_k=8)
        made = np.array(edges, np.int32)
        rows.append(CachedRow(sample_id=f"chat-{n}", token_ids=tokens, target_spans=made, targets=targets))
    making.write_dataset(root, [rows], header=making.tiny_header(tokenizer, draws=0), tokenizer=tokenizer)
    return open_dataset(root)


@pytest.fixture
def chats(tmp_path: Path, tokenizer_folder: Path) -> Dataset:
    spans = [[(5, 9)], [(3, 6), (10, 22)], [(1, 30)], [(40, 41)], [(2, 4), (6, 8), (13, 33)]]
    return write_chats(tmp_path / "chats", tokenizer_folder, spans)


def by_hand(model: Any, prompt: np.ndarray, *, most: int, end: int = 1) -> list[int]:
    """Greedy decoding without cache, batch or padding."""
    tokens = [int(token) for token in prompt]
    while len(tokens) < len(prompt) + most and (len(tokens) == len(prompt) or tokens[-1] != end):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_answer_is_the_last_run_of_targets_and_the_prompt_all_before_it(chats: Dataset) -> None:
    found = questions(chats, limit=9)
    rows = list(chats.rows())
    for question, row, start in zip(found, rows, [6, 11, 2, 41, 14], strict=True):
        assert question.sample_id == row.sample_id
        np.testing.assert_array_equal(question.prompt, row.token_ids[:start])
        np.testing.assert_array_equal(question.reference, row.token_ids[start:])
    assert [question.sample_id for question in questions(chats, limit=2)] == ["chat-0", "chat-1"]


def test_a_dataset_whose_rows_have_no_prompt_is_a_named_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = write_chats(tmp_path / "texts", tokenizer_folder, [[(0, 9)], [(0, 20)]])
    with pytest.raises(NoAnswers, match="no row with a prompt"):
        questions(texts, limit=5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_are_greedy_for_any_batch_and_any_settings_of_the_model(
    chats: Dataset, tmp_path: Path, batch_size: int
) -> None:
    # Among so few tokens and sharp logits answers end at different lengths.
    model = load(making.tiny_llama(tmp_path, seed=3, initializer_range=1.0))
    model.generation_config.repetition_penalty = 5.0
    asked = questions(chats, limit=5)
    found = list(greedy_answers(model, asked, pad_id=1, batch_size=batch_size, max_new_tokens=12))
    for question, answer in zip(asked, found, strict=True):
        wanted = by_hand(model, question.prompt, most=12)
        assert answer[: len(wanted)] == wanted
        assert set(answer[len(wanted) :]) <= {1}


def test_a_tokenizer_without_padding_and_end_is_no_obstacle(chats: Dataset, tmp_path: Path) -> None:
    model = load(making.tiny_llama(tmp_path, seed=3, initializer_range=1.0, pad_token_id=None, eos_token_id=None))
    asked = questions(chats, limit=5)
    together, alone = (
        list(greedy_answers(model, asked, pad_id=None, batch_size=size, max_new_tokens=6)) for size in (3, 1)
    )
    assert together == alone


def test_an_answer_ends_where_the_models_context_does(chats: Dataset, tmp_path: Path) -> None:
    model = load(making.tiny_llama(tmp_path, max_position_embeddings=44, eos_token_id=63))
    found = list(greedy_answers(model, questions(chats, limit=5), pad_id=1, batch_size=1, max_new_tokens=99))
    assert len(found[3]) <= 44 - 41


def test_the_score_is_its_definition(chats: Dataset, tiny_student: Path) -> None:
    pytest.importorskip("rouge_score", reason='needs the extra: pip install "coldstill[eval]"')
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem
    model, tokenizer = load(tiny_student), AutoTokenizer.from_pretrained(tiny_student)
    scores = []
    for question in questions(chats, limit=5):
        texts = [
            tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (by_hand(model, question.prompt, most=20), question.reference.tolist())
        ]
        scores.append(reference.rouge_l(*texts, stem=stem))
    found = rouge_l(model, tokenizer, chats, rows=5, batch_size=2, max_new_tokens=20)
    assert found == pytest.approx(100 * np.mean(scores))


def test_a_student_that_answers_as_the_reference_has_100(
    chats: Dataset, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rouge_score", reason='needs the extra: pip install "coldstill[eval]"')
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    worded = [q for q in questions(chats, limit=5) if any(c.isalnum() for c in tokenizer.decode(q.reference))]
    monkeypatch.setattr("coldstill.trainer.evaluation.rouge.questions", lambda dataset, *, limit: worded)
    monkeypatch.setattr(
        "coldstill.trainer.evaluation.rouge.greedy_answers",
        lambda model, asked, **_: (q.reference.tolist() for q in asked),
    )
    assert rouge_l(None, tokenizer, chats, rows=5, batch_size=2) == pytest.approx(100)


def test_a_missing_library_is_named_with_its_command(
    chats: Dataset, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(PackagesMissing, match=r'pip install "coldstill\[eval\]"'):
        rouge_l(load(tiny_student), None, chats, rows=1, batch_size=1)
