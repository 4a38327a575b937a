"""Laws of the chat template: one call gives ids and mask, and exactly the assistant's tokens are targets."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coldstill.pipeline.errors import SourceNotFound, TemplateCannotMark
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow, parse_row
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.rows import span_positions
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


def test_every_token_of_a_text_row_but_the_first_is_a_target(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"text": "abc"})
    assert _target_text(tokenizer, sequence) == "bc"


def test_what_is_no_text_of_a_row_becomes_metadata(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"id": 5, "text": "abc", "topic": [1, None], "when": float("inf")})
    assert isinstance(sequence, TokenSequence)
    assert sequence.sample_id == "5"
    assert set(sequence.metadata) == {"topic", "when"}


def test_metadata_is_json_also_of_numbers_that_json_does_not_have(tokenizer: PreTrainedTokenizerBase) -> None:
    """Typed columns have NaN where a number is missing, and Python reads 1e999 as infinity."""
    row = parse_row(0, b'{"text": "abc", "score": NaN, "all": [1.5, {"a": -Infinity, "b": 1e999}]}')
    assert row.columns is not None
    sequence = _make(tokenizer, {**row.columns, "other": float("nan")})
    assert isinstance(sequence, TokenSequence)
    assert sequence.metadata == {"score": None, "all": [1.5, {"a": None, "b": None}], "other": None}
    json.dumps(sequence.metadata, allow_nan=False)


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
        ({"messages": [{"role": 3, "content": "hi"}]}, "bad_messages"),
        ({"messages": CHAT, "tools": "not json"}, "bad_tools"),
        ({"messages": CHAT, "tools": {"name": "f"}}, "bad_tools"),
        ({"prompt": "a question", "response": ""}, "no_response"),
        ({"prompt": 5, "response": "a"}, "bad_messages"),
        ({"text": 5}, "no_messages"),
        ({"text": "abc", "note": "x" * (1 << 20)}, "metadata_too_large"),
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


@pytest.mark.parametrize(("given", "name"), [(0, "0"), ("", "row-000000003"), (None, "row-000000003"), ("é", "é")])
def test_a_row_is_named_by_its_id_or_else_by_its_number(
    tokenizer: PreTrainedTokenizerBase, given: object, name: str
) -> None:
    sequence = _make(tokenizer, {"id": given, "text": "abc"})
    assert isinstance(sequence, TokenSequence)
    assert (sequence.sample_id, sequence.source_row) == (name, 3)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("and?", "bye"),
        (CHAT[:4], "bye"),
        (CHAT[:4], CHAT[4:]),
    ],
    ids=["text", "messages and text", "messages"],
)
def test_a_prompt_and_its_response_are_a_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: object, response: object
) -> None:
    columns = {"prompt": prompt, "response": response, "topic": 1}
    sequence = _make(tokenizer, columns, loss_on="last_turn")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else CHAT[:4]
    as_chat = _make(tokenizer, {"messages": [*messages, CHAT[4]], "topic": 1}, loss_on="last_turn")
    assert isinstance(sequence, TokenSequence)
    assert isinstance(as_chat, TokenSequence)
    assert _target_text(tokenizer, sequence) == "bye</s>"
    assert sequence.token_ids.tolist() == as_chat.token_ids.tolist()
    assert sequence.metadata == as_chat.metadata == {"topic": 1}


def test_columns_have_the_names_that_the_settings_give_them(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"q": "and?", "a": "bye", "key": "k"}, prompt="q", response="a", id="key")
    assert isinstance(sequence, TokenSequence)
    assert (sequence.sample_id, sequence.metadata) == ("k", {})


@pytest.mark.parametrize("length", [1, 99, 100, 101, 200, 250])
def test_over_long_rows_are_split_into_parts_that_are_the_row_end_to_end(
    tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    source = SourceConfig(path="x.jsonl", over_long="split")
    row = SourceRow(3, {"id": "x", "text": "abcdefg" * 100, "topic": 1})
    row.columns["text"] = row.columns["text"][:length]
    made = list(SequenceMaker(tokenizer, source=source, max_length=100).sequences([row]))
    whole = tokenizer(row.columns["text"])["input_ids"]
    parts = [part.token_ids.tolist() for part in made if isinstance(part, TokenSequence)]
    rejected = [part for part in made if isinstance(part, Reject)]
    assert list(chain.from_iterable(parts)) == whole[: len(whole) - len(rejected)]
    assert all(len(part) == 100 for part in parts[:-1])
    names = [part.sample_id for part in made]
    assert names == (["x"] if length <= 100 else [f"x~{n}" for n in range(-(-length // 100))])
    # One token alone has nothing before it that would predict it.
    assert [(reject.sample_id, reject.reason) for reject in rejected] == (
        [(names[-1], "no_targets")] if length % 100 == 1 else []
    )


def test_parts_without_targets_are_rejected_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    source = SourceConfig(path="x.jsonl", over_long="split")
    messages = [{"role": "user", "content": "?" * 150}, {"role": "assistant", "content": "!" * 150}]
    made = SequenceMaker(tokenizer, source=source, max_length=100).sequences([SourceRow(3, {"messages": messages})])
    kinds = [(part.sample_id[-2:], getattr(part, "reason", "")) for part in made]
    assert kinds == [("~0", "no_targets"), ("~1", ""), ("~2", ""), ("~3", "")]


def test_over_long_rows_are_cut_by_choice(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = _make(tokenizer, {"text": "x" * 600}, over_long="cut", max_length=100)
    assert isinstance(sequence, TokenSequence)
    assert (sequence.token_ids.size, sequence.target_spans.tolist()) == (100, [[0, 99]])


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_a_template_without_marks_gives_the_same_mask(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, loss_on: str
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(making.CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    marked, plain = (
        _make(tokenizer, {"messages": CHAT}, loss_on=loss_on, chat_template=file) for file in (None, str(path))
    )
    assert isinstance(marked, TokenSequence)
    assert isinstance(plain, TokenSequence)
    assert plain.token_ids.tolist() == marked.token_ids.tolist()
    assert plain.target_spans.tolist() == marked.target_spans.tolist()


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
