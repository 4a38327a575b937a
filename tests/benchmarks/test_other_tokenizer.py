"""Laws of the benchmark of another tokenizer: its text's entropy, its search, and a quick run of the command."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import other_tokenizer
from benchmarks.inputs.invented_text import SENTENCE_END, InventedLanguage
from benchmarks.other_tokenizer import MOST_PASSES, best_neighbor


def test_the_entropy_of_the_language_is_that_of_its_texts_under_the_chain_that_wrote_them() -> None:
    language = InventedLanguage(seed=3)
    number = {word: n for n, word in enumerate(language.words)}
    bits = size = 0.0
    for text in language.texts(60, characters=2000, seed=0):
        words = text.split(" ")
        for before, word in itertools.pairwise(words):
            place = language.successors[number[before.rstrip(".")]].tolist().index(number[word.rstrip(".")])
            bits -= math.log2(language.probabilities[number[before.rstrip(".")], place])
            bits -= math.log2(SENTENCE_END if word.endswith(".") else 1 - SENTENCE_END)
            size += len(word) + 1
    assert bits / size == pytest.approx(language.entropy(), rel=0.02)


def test_texts_follow_from_their_seed_alone() -> None:
    first, second = (InventedLanguage().texts(3, characters=100, seed=seed) for seed in (1, 2))
    assert InventedLanguage().texts(3, characters=100, seed=1) == first != second
    assert all(100 <= len(text) < 130 for text in first)


@pytest.mark.parametrize("best", [(20, 4e-3), (5, 1.6e-2), (MOST_PASSES, 5e-4), (1, 1e-3)])
def test_the_search_ends_where_all_neighbors_are_worse(best: tuple[int, float]) -> None:
    asked: dict[tuple[int, float], float] = {}

    def value(passes: int, rate: float) -> float:
        far = np.log2([passes / best[0], rate / best[1]])
        asked[passes, rate] = float(far @ [[2, 0.5], [0.5, 1]] @ far)
        return asked[passes, rate]

    passes, rate = best_neighbor(value, 20, 4e-3)
    near = [(passes, rate / 2), (passes, rate * 2), (passes * 2, rate), (passes // 2, rate)]
    tried = [pair for pair in near if 1 <= pair[0] <= MOST_PASSES]
    assert all(asked[pair] > asked[passes, rate] for pair in tried)
    assert max(passes for passes, _ in asked) <= MOST_PASSES
    if best[0] == 20:
        assert (passes, rate) == pytest.approx(best)


@pytest.mark.slow
def test_a_quick_run_stores_nothing_and_ends_with_figures_of_every_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setattr("sys.argv", ["other_tokenizer", str(tmp_path)])
    monkeypatch.setattr("benchmarks.common.report.RESULTS", tmp_path / "results")
    name = "invented language"
    monkeypatch.setattr(other_tokenizer, "STUDIES", {name: other_tokenizer.STUDIES[name]})
    other_tokenizer.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = document[name]
    assert set(found["students"]["60 rows"]) == set(other_tokenizer.OTHER)
    assert all(found["entropy_of_the_source"] < run["bits_per_byte"] < 8 for run in found["log"])
    assert not (tmp_path / "results").exists()
    # A second start makes no run again.
    lines = (tmp_path / name / "runs.jsonl").read_text()
    other_tokenizer.main()
    assert (tmp_path / name / "runs.jsonl").read_text() == lines
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[name] == found
