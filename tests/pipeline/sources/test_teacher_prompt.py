"""Laws of a row that the teacher reads after another prompt: the settings make it, and the targets are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.errors import AllRowsRejected, TemplateDrops
from coldstill.pipeline.prepare import open_checked
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.checkpoint import with_read_length
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.rows import span_positions
from tests import making

SYSTEM = {"role": "system", "content": "be kind"}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]
EXAMPLES = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
]
LENIENT = (
    "{% for message in messages %}<s>{{ message['role'] }}:{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(making.chat_model(tmp_path_factory.mktemp("chat")))


def _make(tokenizer: Any, columns: dict[str, Any], *, mode: str = "score", **settings: Any) -> TokenSequence | Reject:
    lengths = {name: settings.pop(name) for name in ("max_length", "max_read_length") if name in settings}
    source = SourceConfig(path="x.jsonl", **settings)
    maker = SequenceMaker(
        tokenizer,
        source=source,
        mode=mode,  # type: ignore[arg-type]
        **{"max_length": 512, "max_read_length": 2048, **lengths},
    )
    return next(maker.sequences([SourceRow(3, columns, "broken")]))


def _made(tokenizer: Any, columns: dict[str, Any], **settings: Any) -> TokenSequence:
    made = _make(tokenizer, columns, **settings)
    assert isinstance(made, TokenSequence), made
    return made


def _labels(token_ids: np.ndarray, spans: np.ndarray) -> list[int]:
    return token_ids[span_positions(spans) + 1].tolist()


def _assert_sides(tokenizer: Any, made: TokenSequence, theirs: str, own: str, targets: str) -> None:
    assert made.stored is not None
    assert tokenizer.decode(made.token_ids) == theirs
    assert tokenizer.decode(made.stored.token_ids) == own
    for ids, spans in ((made.token_ids, made.target_spans), (made.stored.token_ids, made.stored.target_spans)):
        assert tokenizer.decode(_labels(ids, spans)) == targets


OWN = "<s>system:be kind</s><s>user:hi</s><s>assistant:hello</s><s>user:and?</s><s>assistant:bye</s>"


@pytest.mark.parametrize(
    ("settings", "columns", "theirs"),
    [
        ({"teacher_system": "SHOUT"}, {}, OWN.replace("be kind", "SHOUT")),
        (
            {"teacher_prompt": "with"},
            {"with": "doc. hi"},
            OWN.replace("system:be kind</s><s>user:hi", "user:doc. hi"),
        ),
        (
            {"teacher_prompt": "with"},
            {"with": EXAMPLES},
            OWN.replace(
                "system:be kind</s><s>user:hi", "user:2+2?</s><s>assistant:4</s><s>user:3+3?"
            ),
        ),
        (
            {"teacher_prompt": "with", "teacher_system": "SHOUT"},
            {"with": "doc. hi"},
            OWN.replace("system:be kind</s><s>user:hi", "system:SHOUT</s><s>user:doc. hi"),
        ),
        (
            {"teacher_messages": "seen"},
            {"seen": [{"role": "user", "content": "answer: hello"}, *CHAT[2:]]},
            OWN.replace("system:be kind</s><s>user:hi", "user:answer: hello"),
        ),
    ],
)  # fmt: skip
def test_the_teacher_reads_the_chat_of_the_settings_and_both_sides_have_all_target_turns(
    tokenizer: Any, settings: dict[str, Any], columns: dict[str, Any], theirs: str
) -> None:
    made = _made(tokenizer, {"messages": CHAT, "topic": 7, **columns}, **settings)
    _assert_sides(tokenizer, made, theirs, OWN, "hello</s>bye</s>")
    assert made.metadata == {"topic": 7}  # what the teacher alone read is not stored


def test_with_the_last_turn_as_target_a_prompt_stands_for_all_before_it(tokenizer: Any) -> None:
    made = _made(tokenizer, {"messages": CHAT, "with": "x"}, teacher_prompt="with", loss_on="last_turn")
    _assert_sides(tokenizer, made, "<s>user:x</s><s>assistant:bye</s>", OWN, "bye</s>")


def test_a_turn_of_weight_0_is_part_of_the_prompt(tokenizer: Any) -> None:
    chat = [CHAT[1], {**CHAT[2], "weight": 0}, *CHAT[3:]]
    made = _made(tokenizer, {"messages": chat, "with": "x"}, teacher_prompt="with")
    own = OWN.removeprefix("<s>system:be kind</s>")
    _assert_sides(tokenizer, made, "<s>user:x</s><s>assistant:bye</s>", own, "bye</s>")


def test_a_system_message_is_added_to_a_chat_without_one(tokenizer: Any) -> None:
    made = _made(tokenizer, {"messages": CHAT[1:3]}, teacher_system="SHOUT")
    own = "<s>user:hi</s><s>assistant:hello</s>"
    _assert_sides(tokenizer, made, "<s>system:SHOUT</s>" + own, own, "hello</s>")


def test_arguments_are_the_teachers_alone_and_come_on_top(tokenizer: Any, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("<s>{{ mood }}{{ size }}</s>" + LENIENT)
    settings = {"chat_template": str(template), "template_arguments": {"mood": "calm", "size": 1}}
    made = _made(tokenizer, {"messages": CHAT[1:3]}, teacher_template_arguments={"mood": "wild"}, **settings)
    own = "<s>user:hi</s><s>assistant:hello</s>"
    _assert_sides(tokenizer, made, "<s>wild1</s>" + own, "<s>calm1</s>" + own, "hello</s>")


@pytest.mark.parametrize("mode", ["score", "generate"])
@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"teacher_system": "be kind"}, {}),
        ({"teacher_prompt": "with"}, {"with": CHAT[:2]}),
        ({"teacher_messages": "seen"}, {"seen": CHAT[:3]}),
        ({"teacher_template_arguments": {"message": None}}, {}),
    ],
)
def test_a_teacher_that_reads_what_the_row_holds_gets_the_row_of_an_ordinary_capture(
    tokenizer: Any, mode: str, settings: dict[str, Any], columns: dict[str, Any]
) -> None:
    made = _made(tokenizer, {"messages": CHAT[:3], **columns}, mode=mode, **settings)
    ordinary = _made(tokenizer, {"messages": CHAT[:3]}, mode=mode)
    assert made.stored is None
    assert made.metadata == ordinary.metadata
    np.testing.assert_array_equal(made.token_ids, ordinary.token_ids)
    np.testing.assert_array_equal(made.target_spans, ordinary.target_spans)


@pytest.mark.parametrize(
    ("settings", "columns", "theirs"),
    [
        ({"teacher_system": "SHOUT"}, {}, "<s>system:SHOUT</s><s>user:hi</s><s>assistant:"),
        ({"teacher_prompt": "with"}, {"with": "doc"}, "<s>user:doc</s><s>assistant:"),
        ({"teacher_messages": "seen"}, {"seen": [*EXAMPLES, CHAT[2]]}, None),
    ],
)
def test_a_prompt_for_an_answer_ends_with_the_generation_prompt_on_both_sides(
    tokenizer: Any, settings: dict[str, Any], columns: dict[str, Any], theirs: str | None
) -> None:
    made = _made(tokenizer, {"messages": CHAT[:3], **columns}, mode="generate", **settings)
    assert made.stored is not None
    assert tokenizer.decode(made.stored.token_ids) == "<s>system:be kind</s><s>user:hi</s><s>assistant:"
    four = "<s>user:2+2?</s><s>assistant:4</s><s>user:3+3?</s><s>assistant:"
    assert tokenizer.decode(made.token_ids) == (theirs or four)
    assert not made.target_spans.size
    assert not made.stored.target_spans.size


def test_a_template_without_generation_prompt_gives_targets_at_the_last_token_of_each_prompt(tmp_path: Path) -> None:
    bare = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    folder = making.chat_model(tmp_path / "bare", template=bare)
    made = _made(AutoTokenizer.from_pretrained(folder), {"messages": CHAT[1:3]}, teacher_system="SHOUT")
    assert made.stored is not None
    assert made.stored.target_spans.tolist() == [[len("hi"), len("hi") + len("hello") + 1]]
    assert made.target_spans.tolist() == [[8, 14]]
    assert _labels(made.token_ids, made.target_spans) == _labels(made.stored.token_ids, made.stored.target_spans)


def test_a_variable_that_the_template_does_not_read_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TemplateDrops, match=r"(?s)no variable enable_thinking.*teacher_template_arguments"):
        _make(tokenizer, {"messages": CHAT}, teacher_template_arguments={"enable_thinking": False})


# What cannot be scored is rejected by name


def _assert_rejected(made: TokenSequence | Reject, reason: str, detail: str) -> None:
    assert isinstance(made, Reject), made
    assert str(made.reason) == reason
    assert detail in made.detail


@pytest.mark.parametrize(
    ("seen", "detail"),
    [
        (CHAT[:3], "1 target spans for the teacher, 2 in the row"),
        (
            [*CHAT[:4], {"role": "assistant", "content": "bye!"}],
            "target span 1 has 5 tokens for the teacher, 4 in the row",
        ),
        ([*CHAT[:2], {"role": "assistant", "content": "hallo"}, *CHAT[3:]], "token 1 of target span 0 is"),
        ([*EXAMPLES, *CHAT[2:]], "3 target spans for the teacher, 2 in the row"),
    ],
)
def test_a_chat_with_other_target_turns_is_rejected_with_what_differs(
    tokenizer: Any, seen: list[Any], detail: str
) -> None:
    made = _make(tokenizer, {"messages": CHAT, "seen": seen}, teacher_messages="seen")
    _assert_rejected(made, "answer_differs", f"as the teacher reads it: {detail}")


def _word_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE whose merges cross the border between a space and a word, as those of real vocabularies."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "h"), ("Ġh", "i")]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters, "Ġh", "Ġhi"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def test_an_answer_whose_first_token_would_hold_a_space_of_the_prompt_on_one_side_is_rejected() -> None:
    """The teacher's variables put a space at the end of the prompt, which the tokenizer joins with the answer."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}<s>{{ gap }}{{ message['content'] }}</s>"
        "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<s>{{ gap }}{% endif %}"
    )
    tokenizer, row = _word_tokenizer(template), {"messages": [CHAT[1], {"role": "assistant", "content": "hi"}]}
    assert isinstance(_make(tokenizer, row), TokenSequence)
    made = _make(tokenizer, row, teacher_template_arguments={"gap": " "})
    assert isinstance(made, Reject)
    assert str(made.reason) in ("cannot_mark", "answer_differs", "template_cannot_mark")


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"teacher_prompt": "with"}, {"messages": CHAT}),
        ({"teacher_prompt": "with"}, {"messages": CHAT, "with": ""}),
        ({"teacher_messages": "seen"}, {"messages": CHAT, "seen": []}),
        ({"teacher_system": "SHOUT"}, {"text": "plain"}),
    ],
)
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_a_row_without_the_teachers_prompt_is_rejected(
    tokenizer: Any, mode: str, settings: dict[str, Any], columns: dict[str, Any]
) -> None:
    _assert_rejected(_make(tokenizer, columns, mode=mode, **settings), "no_teacher_prompt", "as the teacher reads it")


def test_the_teachers_side_has_a_bound_of_its_own_and_is_never_cut(tokenizer: Any) -> None:
    row = {"messages": CHAT[1:3], "with": "d" * 600}
    own = 4 + len("user:hi") + len("assistant:hello")  # a special token at each end of a turn
    theirs = own + 598
    settings = {"teacher_prompt": "with", "max_length": own}
    made = _made(tokenizer, row, **settings, max_read_length=theirs)
    assert made.stored is not None
    assert (made.token_ids.size, made.stored.token_ids.size) == (theirs, own)
    _assert_rejected(
        _make(tokenizer, row, **settings, max_read_length=theirs - 1), "teacher_over_long", f"{theirs} tokens"
    )
    _assert_rejected(_make(tokenizer, row, **{**settings, "max_length": own - 1}), "over_long", f"{own} tokens")
    prompt = theirs - 6  # "hello</s>" is the teacher's to write
    assert _made(tokenizer, row, mode="generate", **settings, max_read_length=prompt + 1).token_ids.size == prompt
    _assert_rejected(
        _make(tokenizer, row, mode="generate", **settings, max_read_length=prompt), "teacher_over_long", "an answer"
    )


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_messages": "m", "teacher_system": "s"}, "whole chat, without teacher_system"),
        ({"teacher_messages": "m", "teacher_prompt": "p"}, "whole chat, without teacher_prompt"),
        ({"teacher_system": "s", "over_long": "cut"}, "over_long reject with teacher_system, not cut"),
        ({"teacher_prompt": "p", "over_long": "split"}, "over_long reject with teacher_prompt, not split"),
        ({"teacher_system": "s", "loss_on": "all"}, "loss_on assistant or last_turn with teacher_system"),
        ({"teacher_system": ""}, "at least 1 character"),
        ({"teacher_prompt": ""}, "at least 1 character"),  # else an ordinary capture, without a word
        ({"teacher_messages": ""}, "at least 1 character"),
        ({"score_ids": ""}, "at least 1 character"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceConfig(path="x.jsonl", **settings)


def _capture(**changes: Any) -> CaptureConfig:
    source = {"path": "x.jsonl", **changes.pop("source", {})}
    teacher = {"model": "any", "max_length": 100, **changes.pop("teacher", {})}
    return CaptureConfig.model_validate({"output": "x", "source": source, "teacher": teacher, **changes})


def test_the_bound_of_the_teachers_side_is_four_rows_within_the_context_and_belongs_to_a_teachers_prompt(
    tmp_path: Path,
) -> None:
    prompted, model = {"teacher_system": "s"}, str(making.chat_model(tmp_path / "teacher", context=700))

    def length(max_length: int, **changes: Any) -> int:
        return with_read_length(
            _capture(teacher={"model": model, "max_length": max_length}, **changes)
        ).teacher.read_length

    assert length(100) == 100
    assert length(100, source=prompted) == 400
    assert length(300, source=prompted) == 700, "the model's context"
    assert length(900, source=prompted) == 900, "which the check of max_length names"
    own = _capture(source=prompted, teacher={"max_read_length": 50})
    assert with_read_length(own) is own
    assert own.teacher.read_length == 50
    with pytest.raises(ValidationError, match=r"max_read_length with one of source\.teacher_system"):
        _capture(teacher={"max_read_length": 500})
    with pytest.raises(ValidationError, match=r"score or generate with source\.teacher_system, not pretrain"):
        _capture(source=prompted, mode="pretrain")


def test_a_source_of_which_no_row_has_the_column_does_not_start(tmp_path: Path) -> None:
    model = making.chat_model(tmp_path / "teacher")
    making.write_jsonl(tmp_path / "rows.jsonl", making.chat_rows(5))
    config = _capture(
        source={"path": str(tmp_path / "rows.jsonl"), "teacher_prompt": "hint"}, teacher={"model": str(model)}
    )
    with pytest.raises(AllRowsRejected, match=r"(?s)no_teacher_prompt.*'hint' is empty"):
        open_checked(config)
