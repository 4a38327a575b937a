"""Laws of loss masks without marks, on templates shaped like well-known ones: proven token by token, or an error."""

from __future__ import annotations

from typing import Any

import pytest

from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.rows import span_positions
from tests.pipeline.sources import templates
from tests.pipeline.sources.templates import LLAMA3, MISTRAL, QWEN3, QWEN25

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def _chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[role], "content": content} for role, content in turns]


TWO_TURNS = _chat(("s", "be kind"), ("u", "hi"), ("a", "hello\nyou"), ("u", "and?"), ("a", "bye"))
WITH_CALL = [
    *_chat(("u", "1 + 2?")),
    {"role": "assistant", "tool_calls": [CALL]},
    *_chat(("t", "3"), ("a", "It is 3.")),
]


def _maker(template: str, *, end: str | None = None, **settings: Any) -> SequenceMaker:
    tokenizer = templates.tokenizer(template, end=end)
    return SequenceMaker(tokenizer, source=SourceConfig(path="x.jsonl", **settings), max_length=4096)


def _target_text(maker: SequenceMaker, columns: dict[str, Any]) -> list[str]:
    """Text of each run of targets."""
    made = maker.make(SourceRow(0, columns))
    assert isinstance(made, TokenSequence), made
    return [maker.tokenizer.decode(made.token_ids[start + 1 : stop + 1]) for start, stop in made.target_spans]


@pytest.mark.parametrize("template", [LLAMA3, QWEN25], ids=["llama3", "qwen2.5"])
@pytest.mark.parametrize("loss_on", ["assistant", "last_turn"])
def test_the_targets_are_the_assistants_words_to_the_end_of_its_turn(template: str, loss_on: str) -> None:
    end = templates.ENDS[template]
    wanted = [f"hello\nyou{end}", f"bye{end}"]
    maker = _maker(template, loss_on=loss_on)
    assert _target_text(maker, {"messages": TWO_TURNS}) == (wanted if loss_on == "assistant" else wanted[1:])


def test_mistral_shaped_turns_are_proven_too() -> None:
    assert _target_text(_maker(MISTRAL), {"messages": TWO_TURNS[1:]}) == [" hello\nyou</s>", " bye</s>"]


@pytest.mark.parametrize("template", [LLAMA3, QWEN25, MISTRAL], ids=["llama3", "qwen2.5", "mistral"])
def test_a_proven_mask_is_that_of_the_same_template_with_marks(template: str) -> None:
    """Marks by hand: round all that an assistant's turn renders to."""
    begin = {
        LLAMA3: "{%- if 'tool_calls' in message %}",
        QWEN25: "{%- if message.content %}",
        MISTRAL: "{%- elif message.tool_calls %}",
    }[template]
    if template == QWEN25:
        marked = template.replace(begin, "{% generation %}" + begin, 1)
        marked = marked.replace(
            "{%- endfor %}{{- '<|im_end|>\n' }}{%- else %}",
            "{%- endfor %}{{- '<|im_end|>' }}{% endgeneration %}{{- '\n' }}{%- else %}",
        )
    elif template == LLAMA3:
        body = template[template.index(begin) : template.index("{%- endfor %}{%- if add_generation_prompt")]
        marked = template.replace(
            body,
            "{%- if message.role == 'assistant' %}{% generation %}" + body + "{% endgeneration %}{%- else %}"
            "{{- message['content'] | trim }}{{- '<|eot_id|>' }}{%- endif %}",
        )
    else:
        marked = (
            template.replace(
                "{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}",
                "{%- else %}{% generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}{%- endif %}",
            )
            .replace("{{- '[TOOL_CALLS] '", "{% generation %}{{- '[TOOL_CALLS] '")
            .replace("{{- eos_token }}{%- else %}", "{{- eos_token }}{% endgeneration %}{%- else %}")
        )
    assert "generation %}" in marked.replace("add_generation_prompt", "")
    for messages in (TWO_TURNS[1:], WITH_CALL):
        plain, with_marks = (
            _maker(text, end=templates.ENDS[template]).make(SourceRow(0, {"messages": messages, "tools": TOOLS[:0]}))
            for text in (template, marked)
        )
        assert isinstance(plain, TokenSequence)
        assert isinstance(with_marks, TokenSequence)
        assert plain.token_ids.tolist() == with_marks.token_ids.tolist()
        assert plain.target_spans.tolist() == with_marks.target_spans.tolist()


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (LLAMA3, '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>'),
        (QWEN25, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}]</s>'),
    ],
    ids=["llama3", "qwen2.5", "mistral"],
)
def test_tool_calls_are_the_assistants_words(template: str, call: str) -> None:
    tools = [] if template == LLAMA3 else TOOLS  # this template drops them
    texts = _target_text(_maker(template), {"messages": WITH_CALL, "tools": tools})
    assert texts[0] == call
    assert len(texts) == 2
    assert "It is 3." in texts[1]


def test_tools_reach_the_template_from_a_column_of_any_name_as_list_or_text() -> None:
    import json

    listed, text = (
        _maker(QWEN25, tools="functions").make(SourceRow(0, {"messages": WITH_CALL, "functions": tools}))
        for tools in (TOOLS, json.dumps(TOOLS))
    )
    assert isinstance(listed, TokenSequence)
    assert isinstance(text, TokenSequence)
    assert "# Tools" in templates.tokenizer(QWEN25).decode(listed.token_ids)
    assert listed.token_ids.tolist() == text.token_ids.tolist()
    assert listed.metadata == {}


def test_null_fields_of_typed_columns_are_no_fields() -> None:
    """Arrow gives every message the fields of all; a template that asks whether one is there must not see them."""
    typed = [{"tool_calls": None, "name": None, **message} for message in TWO_TURNS]
    assert _target_text(_maker(LLAMA3), {"messages": typed}) == _target_text(_maker(LLAMA3), {"messages": TWO_TURNS})


THINKING = _chat(
    ("u", "1 + 2?"), ("a", "<think>\neasy\n</think>\n\n3"), ("u", "and 4?"), ("a", "<think>\nhm\n</think>\n\n7")
)


def test_thinking_of_the_last_turn_is_a_target_and_history_is_one_as_it_is_shown() -> None:
    """The template takes the thinking out of earlier turns: what is left of them is proven to be their own end."""
    assert _target_text(_maker(QWEN3), {"messages": THINKING}) == [
        "3<|im_end|>",
        "<think>\nhm\n</think>\n\n7<|im_end|>",
    ]
    assert _target_text(_maker(QWEN3, loss_on="last_turn"), {"messages": THINKING}) == [
        "<think>\nhm\n</think>\n\n7<|im_end|>"
    ]


def test_thinking_between_tool_calls_may_be_gone_once_a_question_follows() -> None:
    """What the teacher is shown before the second turn has the thinking of the first; the whole chat has not."""
    messages = [*_chat(("u", "q"), ("a", "<think>\nx\n</think>\n\nr"), ("t", "3")), *THINKING[1:]]
    assert _target_text(_maker(QWEN3), {"messages": messages}) == [
        "r<|im_end|>",
        "3<|im_end|>",
        "<think>\nhm\n</think>\n\n7<|im_end|>",
    ]


def test_thinking_in_a_field_of_its_own_reaches_the_template() -> None:
    messages = [*_chat(("u", "1 + 2?")), {"role": "assistant", "reasoning_content": "easy", "content": "3"}]
    assert _target_text(_maker(QWEN3), {"messages": messages}) == ["<think>\neasy\n</think>\n\n3<|im_end|>"]


def test_template_arguments_change_what_the_prompt_holds_and_the_templates_digest() -> None:
    chat = _chat(("u", "1 + 2?"), ("a", "3"))
    plain, without = _maker(QWEN3), _maker(QWEN3, template_arguments={"enable_thinking": False})
    assert _target_text(plain, {"messages": chat}) == ["<think>\n\n</think>\n\n3<|im_end|>"]
    assert _target_text(without, {"messages": chat}) == ["3<|im_end|>"]
    assert plain.template_sha256 != without.template_sha256


REWRITTEN = {
    "tools stand before the last question only": (
        MISTRAL,
        {"messages": _chat(("u", "hi"), ("a", "hello"), ("u", "and?"), ("a", "bye")), "tools": TOOLS},
    ),
    "a turn that changes its words": (
        "{% for m in messages %}{{ m.content if loop.last else m.content ~ '!' }}</s>{% endfor %}",
        {"messages": _chat(("u", "hi"), ("a", "hello"), ("u", "x"))},
    ),
    "a turn that adds nothing": (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        {"messages": _chat(("u", "hi"), ("a", ""), ("u", "x"))},
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_template_that_rewrites_what_came_before_is_an_error_never_a_guess(name: str) -> None:
    template, columns = REWRITTEN[name]
    maker = _maker(template, end=templates.ENDS.get(template, "</s>"))
    with pytest.raises(TemplateCannotMark, match="generation"):
        maker.check([SourceRow(0, columns)])
    (reject,) = maker.sequences([SourceRow(0, columns)])
    assert isinstance(reject, Reject)
    assert reject.reason == "template_cannot_mark"
    everything = _maker(template, end=templates.ENDS.get(template, "</s>"), loss_on="all")
    assert isinstance(everything.make(SourceRow(0, columns)), TokenSequence)


def test_a_token_that_crosses_the_border_of_a_turn_rejects_its_row_not_the_template() -> None:
    """Two line ends are one token: the prompt ends in the middle of it."""
    maker = _maker(QWEN25)
    columns = {"messages": _chat(("u", "hi"), ("a", "\nhello"))}
    maker.check([SourceRow(0, columns)])
    (reject,) = maker.sequences([SourceRow(0, columns)])
    assert isinstance(reject, Reject)
    assert reject.reason == "cannot_mark"


def test_history_that_cannot_be_told_from_other_words_is_refused() -> None:
    """Turns without an end of their own: what follows them up to the next end is not theirs alone."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role == 'user' else '~' ~ m.content }}"
        "{{ '</s>' if m.role == 'user' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(TemplateCannotMark, match="rewritten"):
        _maker(template, end="</s>").make(SourceRow(0, {"messages": TWO_TURNS[1:]}))


@pytest.mark.parametrize("template", [LLAMA3, QWEN25, QWEN3, MISTRAL], ids=["llama3", "qwen2.5", "qwen3", "mistral"])
def test_the_target_positions_are_those_at_which_the_teacher_would_speak(template: str) -> None:
    """Slow reference: each run of targets begins after the very tokens that the teacher is shown before that turn."""
    maker = _maker(template)
    tokenizer, chat = maker.tokenizer, TWO_TURNS[1:]
    made = maker.make(SourceRow(0, {"messages": chat}))
    assert isinstance(made, TokenSequence)
    positions = span_positions(made.target_spans).tolist()
    for turn in (1, 3):
        shown = tokenizer.apply_chat_template(chat[:turn], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert made.token_ids[: len(shown)].tolist() == shown
        assert len(shown) - 1 in positions
        assert len(shown) - 2 not in positions


def test_a_row_whose_template_would_never_end_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldstill.common.template_limits.MAX_STEPS", 100_000)
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    maker = _maker(f"{{% if messages[0].content == 'again' %}}{loops}{{% endif %}}{QWEN25}", end=templates.ENDS[QWEN25])
    rows = [{"messages": _chat(("u", said), ("a", "bye"))} for said in ("hi", "again")]
    good, bad = [maker.make(SourceRow(number, row)) for number, row in enumerate(rows)]
    assert isinstance(good, TokenSequence)
    assert isinstance(bad, Reject)
    assert bad.reason == "template_failed"
    assert "more than 100,000 steps" in bad.detail
