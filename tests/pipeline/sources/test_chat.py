"""Laws of the chat template: one call gives ids and mask, and exactly the assistant's tokens are targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config import SourceConfig
from pipeline.errors import SourceNotFound, TemplateCannotMark
from pipeline.sequences import TokenSequence
from pipeline.sources.chat import SequenceMaker
from pipeline.sources.readers import SourceRow
from storage_schema.commits import Reject
from storage_schema.rows import span_positions
from tests import making

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def _make(
    tokenizer: PreTrainedTokenizerBase, columns: dict[str, Any] | None, **settings: Any
) -> TokenSequence | Reject:
    max_length = settings.pop("max_length", 512)
    source = SourceConfig(path="x.jsonl", **settings)
    return SequenceMaker(tokenizer, source=source, max_length=max_length).make(SourceRow(3, columns, "broken"))


def _target_text(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence | Reject) -> str:
    assert isinstance(sequence, TokenSequence)
    return tokenizer.decode(sequence.token_ids[span_positions(sequence.target_spans) + 1])


@pytest.mark.parametrize(
    ("loss_on", "text"), [("assistant", "hello</s>bye</s>"), ("last_turn", "bye</s>")], ids=["assistant", "last_turn"]
)
def test_the_targets_predict_exactly_the_assistants_tokens(
    tokenizer: PreTrainedTokenizerBase, loss_on: str, text: str
) -> None:
    assert _target_text(tokenizer, _make(tokenizer, {"messages": CHAT}, loss_on=loss_on)) == text


def test_loss_on_all_predicts_every_token_but_the_first(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"messages": CHAT}, loss_on="all")
    assert isinstance(sequence, TokenSequence)
    assert sequence.target_spans.tolist() == [[0, sequence.token_ids.size - 1]]


def test_the_mask_does_not_change_the_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    made = [_make(tokenizer, {"messages": CHAT}, loss_on=loss_on) for loss_on in ("all", "assistant", "last_turn")]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    for sequence in made:
        assert isinstance(sequence, TokenSequence)
        assert sequence.token_ids.tolist() == whole


def test_text_rows_are_learned_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"text": "abc"})
    assert _target_text(tokenizer, sequence) == "bc"


def test_what_is_no_text_of_a_row_becomes_metadata(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"id": 5, "text": "abc", "topic": [1, None], "when": float("inf")})
    assert isinstance(sequence, TokenSequence)
    assert sequence.sample_id == "5"
    assert set(sequence.metadata) == {"topic", "when"}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (None, "not_json"),
        ({}, "no_messages"),
        ({"messages": [], "text": ""}, "no_messages"),
        ({"messages": "hello"}, "bad_messages"),
        ({"messages": [{"content": "no role"}]}, "bad_messages"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 3}]}, "bad_messages"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "bad_messages"),
        ({"messages": [{"role": "user", "content": "only a question"}]}, "no_targets"),
        ({"text": "a"}, "no_targets"),
        ({"messages": [*CHAT, {"role": "user", "content": "x" * 600}]}, "over_long"),
    ],
)
def test_a_row_that_cannot_be_used_is_rejected_with_its_reason(
    tokenizer: PreTrainedTokenizerBase, columns: dict[str, Any] | None, reason: str
) -> None:
    reject = _make(tokenizer, columns)
    assert isinstance(reject, Reject), reject
    assert (reject.reason, reject.source_row, reject.sample_id) == (reason, 3, "row-000000003")
    assert reject.detail


def test_a_template_that_raises_rejects_its_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% generation %}{% endgeneration %}{{ raise_exception('roles must alternate') }}")
    reject = _make(tokenizer, {"messages": CHAT}, chat_template=str(path))
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.detail) == ("template_failed", "TemplateError: roles must alternate")


def test_over_long_rows_are_cut_by_choice(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"text": "x" * 600}, over_long="cut", max_length=100)
    assert isinstance(sequence, TokenSequence)
    assert (sequence.token_ids.size, sequence.target_spans.tolist()) == (100, [[0, 99]])


def test_a_template_without_generation_marks_is_an_error_never_a_guess(tmp_path: Path) -> None:
    plain = making.CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = AutoTokenizer.from_pretrained(making.chat_model(tmp_path / "m", template=plain))
    with pytest.raises(TemplateCannotMark, match="generation"):
        _make(tokenizer, {"messages": CHAT})
    assert isinstance(_make(tokenizer, {"messages": CHAT}, loss_on="all"), TokenSequence)


def test_a_model_without_a_template_is_an_error(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(making.chat_model(tmp_path / "m", template=None))
    with pytest.raises(TemplateCannotMark, match="no chat template"):
        _make(tokenizer, {"messages": CHAT})


def test_a_template_from_a_file_replaces_the_tokenizers_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(making.CHAT_TEMPLATE.replace("<s>", "<s><s>"))
    own, other = (_make(tokenizer, {"messages": CHAT}, chat_template=file) for file in (None, str(path)))
    assert isinstance(own, TokenSequence)
    assert isinstance(other, TokenSequence)
    assert other.token_ids.size == own.token_ids.size + len(CHAT)
    with pytest.raises(SourceNotFound, match="chat_template"):
        _make(tokenizer, {"messages": CHAT}, chat_template=str(tmp_path / "absent"))
