"""Laws of sampling: which tokens can be chosen, how often, where an answer ends, and that its numbers are its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coldstill.pipeline.config import SamplingConfig
from coldstill.pipeline.teachers.answer_sampling import (
    StopTexts,
    answer_room,
    answer_seed,
    answer_sequence,
    answer_uniforms,
    next_token,
    top_p_set,
)
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.pipeline.teachers.target_extractor import draw_uniforms
from coldstill.storage_schema.errors import InvalidRow
from tests import making


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.75, 0.999])
def test_the_top_p_set_is_the_smallest_of_that_mass(top_p: float) -> None:
    for probs in making.random_probs(np.random.default_rng(0), 20, 30):
        wanted: list[int] = []
        for id_ in sorted(range(30), key=lambda v: (-probs[v], v)):
            if sum(probs[v] for v in wanted) >= top_p:
                break
            wanted.append(id_)
        assert top_p_set(probs, top_p).tolist() == wanted


def test_of_equals_the_top_p_set_takes_the_lowest_ids() -> None:
    assert top_p_set(np.full(8, 0.125), 0.3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("uniform", [0.0, 0.4, 1 - 2**-53])
def test_temperature_0_takes_the_most_probable_token_for_any_number(uniform: float) -> None:
    logits = np.array([0.5, 2.0, 2.0, -1.0], np.float32)
    assert next_token(logits, temperature=0, top_p=0.5, uniform=uniform) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
def test_tokens_are_as_frequent_as_the_tempered_and_cut_softmax(temperature: float, top_p: float) -> None:
    """Chi-square of 50,000 tokens, fixed seed, .1 % critical values."""
    count = 50_000
    logits = np.random.default_rng(3).standard_normal(10).astype(np.float32)
    probs = np.exp(logits.astype(np.float64) / temperature)
    probs /= probs.sum()
    allowed = top_p_set(probs, top_p) if top_p < 1 else np.arange(10)
    uniforms = answer_uniforms(seed=5, sample_id="a", number=0, count=count)
    tokens = [next_token(logits, temperature=temperature, top_p=top_p, uniform=u) for u in uniforms]
    observed = np.bincount(tokens, minlength=10)
    assert observed.sum() == observed[allowed].sum()
    expected = count * probs[allowed] / probs[allowed].sum()
    statistic = float(((observed[allowed] - expected) ** 2 / expected).sum())
    critical = {4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88}[len(allowed) - 1]
    assert statistic < critical


@pytest.mark.parametrize("top_p", [0.9999, 1.0])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_mass_is_never_chosen(uniform: float, top_p: float) -> None:
    logits = np.array([-np.inf, 0.0, 1.0, -np.inf])
    assert next_token(logits, temperature=1, top_p=top_p, uniform=uniform) in (1, 2)


def test_the_numbers_of_an_answer_do_not_depend_on_how_many_are_asked_for() -> None:
    few = answer_uniforms(seed=1, sample_id="a", number=2, count=3)
    many = answer_uniforms(seed=1, sample_id="a", number=2, count=100)
    np.testing.assert_array_equal(few, many[:3])
    assert ((many >= 0) & (many < 1)).all()


def test_each_answer_has_numbers_of_its_own() -> None:
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    firsts = {float(answer_uniforms(seed=s, sample_id=i, number=n, count=1)[0]) for s, i, n in keys}
    firsts.add(float(draw_uniforms(np.array([0]), draws=1, seed=0, sample_id="a")[0, 0]))
    assert len(firsts) == len(keys) + 1
    seeds = {answer_seed(seed=s, sample_id=i, number=n) for s, i, n in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A byte a token, so that a letter beyond ASCII takes several."""
    return AutoTokenizer.from_pretrained(making.chat_model(tmp_path_factory.mktemp("teacher")))


@pytest.mark.parametrize("stop", ["END", "naïve", "ïve E", "</s>", " tail</s>", "日本", "t"])
@pytest.mark.parametrize("other", [[], ["not in it"], ["", "a very long stop text " * 20]])
def test_the_end_is_the_token_that_completes_a_stop_text(
    tokenizer: PreTrainedTokenizerBase, stop: str, other: list[str]
) -> None:
    text = "So " * 50 + "naïve END 日本語 tail</s> and more"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    stops = StopTexts([*other, stop], tokenizer)
    end = next(n for n in range(1, len(tokens) + 1) if stops.end(tokens[:n]))
    assert tokenizer.decode(tokens[:end]) == text[: text.index(stop) + len(stop)]


def test_without_stop_texts_nothing_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not StopTexts([], tokenizer).end([5, 6, 7])


def _prompt(tokens: int) -> TokenSequence:
    return TokenSequence(
        sample_id="a",
        source_row=3,
        token_ids=np.arange(tokens, dtype=np.int32),
        target_spans=np.empty((0, 2), np.int32),
        metadata={"topic": 1},
    )


def test_all_tokens_of_an_answer_are_targets() -> None:
    answer = answer_sequence(_prompt(4), [9, 8, 7], number=2, answers=3, finish_reason="length")
    assert answer.sample_id == "a#2"
    assert answer.source_row == 3
    assert answer.token_ids.tolist() == [0, 1, 2, 3, 9, 8, 7]
    assert answer.token_ids.dtype == np.int32
    assert answer.target_spans.tolist() == [[3, 6]]
    assert answer.metadata == {"topic": 1, "finish_reason": "length"}
    assert answer_sequence(_prompt(4), [9], number=0, answers=1, finish_reason="stop").sample_id == "a"


def test_room_ends_at_max_tokens_or_at_max_length(tmp_path: Path) -> None:
    header = making.tiny_header(making.tiny_tokenizer(tmp_path), max_length=10)
    sampling = SamplingConfig(max_tokens=4)
    rooms = [answer_room(_prompt(tokens), sampling=sampling, header=header) for tokens in range(1, 10)]
    assert rooms == [4, 4, 4, 4, 4, 4, 3, 2, 1]
    for tokens in (0, 10, 11):
        with pytest.raises(InvalidRow, match=r"1\.\.9"):
            answer_room(_prompt(tokens), sampling=sampling, header=header)
