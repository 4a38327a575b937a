"""Laws of the rows of each mode: prompts for generate, documents for pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coldstill.pipeline.errors import TeacherUnusable
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from tests import making

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(making.chat_model(tmp_path_factory.mktemp("chat")))


def _maker(tokenizer: PreTrainedTokenizerBase, **options: Any) -> SequenceMaker:
    length, source = options.pop("max_length", 64), SourceConfig(path="x.jsonl", **options.pop("source", {}))
    return SequenceMaker(tokenizer, source=source, max_length=length, **options)


def _made(maker: SequenceMaker, *columns: dict[str, Any] | None) -> list[TokenSequence | Reject]:
    return list(maker.sequences(SourceRow(number, row, "broken") for number, row in enumerate(columns)))


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": CHAT[:3]},
        {"messages": CHAT},
        {"prompt": CHAT[:3]},
        {"prompt": CHAT[:3], "response": "ignored"},
    ],
    ids=["messages", "answered messages", "prompt", "prompt and response"],
)
def test_a_prompt_ends_where_the_assistant_starts_and_has_no_targets(
    tokenizer: PreTrainedTokenizerBase, columns: dict[str, Any]
) -> None:
    (prompt,) = _made(_maker(tokenizer, mode="generate"), {**columns, "topic": 1})
    assert isinstance(prompt, TokenSequence)
    assert tokenizer.decode(prompt.token_ids) == "<s>user:hi</s><s>assistant:hello</s><s>user:and?</s><s>assistant:"
    assert prompt.target_spans.shape == (0, 2)
    assert prompt.metadata == {"topic": 1}


def test_text_is_a_prompt_as_it_stands(tokenizer: PreTrainedTokenizerBase) -> None:
    one, chat = _made(_maker(tokenizer, mode="generate"), {"text": "once upon"}, {"prompt": "hi"})
    assert isinstance(one, TokenSequence)
    assert isinstance(chat, TokenSequence)
    assert tokenizer.decode(one.token_ids) == "once upon"
    assert tokenizer.decode(chat.token_ids) == "<s>user:hi</s><s>assistant:"


@pytest.mark.parametrize("over_long", ["reject", "cut", "split"])
def test_a_prompt_that_leaves_no_room_is_rejected_never_cut(tokenizer: PreTrainedTokenizerBase, over_long: str) -> None:
    maker = _maker(tokenizer, mode="generate", source={"over_long": over_long})
    fits, full = _made(maker, {"text": "x" * 63}, {"text": "x" * 64})
    assert isinstance(fits, TokenSequence)
    assert isinstance(full, Reject)
    assert full.reason == "no_room"
    assert maker.over_long == "reject"


def test_rows_without_a_prompt_are_rejected_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    made = _made(_maker(tokenizer, mode="generate"), {"messages": CHAT[1:2]}, {}, None)
    assert [reject.reason for reject in made if isinstance(reject, Reject)] == ["no_prompt", "no_messages", "not_json"]


def test_each_document_is_a_row_whose_every_token_is_a_target(tokenizer: PreTrainedTokenizerBase) -> None:
    made = _made(_maker(tokenizer, mode="pretrain"), {"id": "a", "text": "abc", "topic": 1}, {"messages": CHAT})
    document, reject = made
    assert isinstance(document, TokenSequence)
    assert isinstance(reject, Reject)
    assert tokenizer.decode(document.token_ids) == "abc</s>"
    assert document.target_spans.tolist() == [[0, 3]]
    assert (document.sample_id, document.metadata, reject.reason) == ("a", {"topic": 1}, "no_text")


@pytest.mark.parametrize("over_long", ["reject", "cut", "split"])
def test_long_documents_are_cut_or_split(tokenizer: PreTrainedTokenizerBase, over_long: str) -> None:
    maker = _maker(tokenizer, mode="pretrain", source={"over_long": over_long})
    made = _made(maker, {"id": "a", "text": "x" * 100})
    sizes = [part.token_ids.size for part in made if isinstance(part, TokenSequence)]
    assert sizes == ([64, 37] if over_long == "split" else [64])
    assert maker.over_long == ("split" if over_long == "split" else "cut")


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=12), max_length=st.integers(2, 17))
def test_joined_documents_are_rows_of_one_length_that_are_the_text_end_to_end(
    tokenizer: PreTrainedTokenizerBase, lengths: list[int], max_length: int
) -> None:
    texts = [chr(97 + n % 26) * length for n, length in enumerate(lengths)]
    maker = _maker(tokenizer, mode="pretrain", documents="concat", max_length=max_length)
    made = _made(maker, *({"id": f"d{n}", "text": text} for n, text in enumerate(texts)))
    rows = [row for row in made if isinstance(row, TokenSequence)]
    whole = [
        (number, place, token)
        for number, text in enumerate(texts)
        if text
        for place, token in enumerate(tokenizer(f"{text}</s>")["input_ids"])
    ]
    assert [row.token_ids.size for row in rows[:-1]] == [max_length] * len(rows[:-1])
    assert maker.over_long == "split"
    start = 0
    for row in rows:
        mine = whole[start : start + row.token_ids.size]
        assert row.token_ids.tolist() == [token for _, _, token in mine]
        assert row.target_spans.tolist() == [[0, len(mine) - 1]]
        assert row.sample_id == f"d{mine[0][0]}@{mine[0][1]}"
        assert row.source_row == mine[0][0]
        assert row.metadata == {"source_rows": sorted({number for number, _, _ in mine})}
        start += len(mine)
    reasons = [reject.reason for reject in made if isinstance(reject, Reject)]
    assert reasons.count("no_text") == lengths.count(0)
    assert len(whole) - start == reasons.count("no_targets") <= 1
    assert len({row.sample_id for row in rows}) == len(rows)


def test_documents_are_joined_only_where_there_is_a_separator(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(making.tiny_tokenizer(tmp_path))
    tokenizer.eos_token = None
    with pytest.raises(TeacherUnusable, match="documents to isolate"):
        _maker(tokenizer, mode="pretrain", documents="concat")
    (document,) = _made(_maker(tokenizer, mode="pretrain"), {"text": "ABC"})
    assert isinstance(document, TokenSequence)
    assert document.token_ids.size == 3


@pytest.mark.parametrize("documents", ["isolate", "concat"])
def test_a_row_with_more_targets_than_readers_take_at_this_k_is_rejected(
    tokenizer: PreTrainedTokenizerBase, documents: str
) -> None:
    """2^24 kept ids: they would be written, and no one could read them."""
    maker = _maker(tokenizer, mode="pretrain", documents=documents, max_length=1 << 13, top_k=4096)
    fits, exceeds = _made(maker, {"text": "a" * 4096})[0], _made(maker, {"text": "a" * 4097})[0]
    assert isinstance(fits, TokenSequence)
    assert fits.target_spans.tolist() == [[0, 4096]]  # with the end of the document
    assert isinstance(exceeds, Reject)
    assert exceeds.reason == "too_many_targets"
