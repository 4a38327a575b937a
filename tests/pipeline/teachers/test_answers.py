"""Laws of answers: where they end, what they are called, how much room they have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coldstill.pipeline.config import SamplingConfig
from coldstill.pipeline.sequences import TokenSequence
from coldstill.pipeline.teachers.answers import StopTexts, answer_room, answer_sequence
from coldstill.storage_schema.errors import InvalidRow
from tests import making


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
