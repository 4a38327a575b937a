"""Laws of loss masks: marks select whole tokens of the assistant's text, the first end token closes it, errors help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.chat_template import ChatTemplate
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from tests.pipeline.sources import templates
from tests.pipeline.sources.templates import MISTRAL, QWEN25

TURNS = [("u", "hi"), ("a", "hello 👍"), ("u", "and?"), ("a", "bye\n")]
PLAIN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def _marked(turn: str) -> str:
    """A ChatML template that renders an assistant's turn as `turn`."""
    return (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}" + turn + "{%- else %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )


_OPEN, _CLOSE, _HEAD = "{% generation %}", "{% endgeneration %}", "{{- '<|im_start|>assistant\n' }}"
MARKED = {
    "round the content": _marked(_HEAD + _OPEN + "{{- m.content }}" + _CLOSE + "{{- '<|im_end|>\n' }}"),
    "round content and end": _marked(_HEAD + _OPEN + "{{- m.content + '<|im_end|>' }}" + _CLOSE + "{{- '\n' }}"),
    "with the line end after the end": _marked(_HEAD + _OPEN + "{{- m.content + '<|im_end|>\n' }}" + _CLOSE),
    "with the generation prompt": _marked(
        _OPEN + "{{- '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}" + _CLOSE + "{{- '\n' }}"
    ),
    "round everything": "{% generation %}" + PLAIN.replace("{%- if add", "{% endgeneration %}{%- if add"),
    "on lines of their own": _marked(
        _HEAD + "\n    {%- generation -%}\n    {{- m.content }}\n    {%- endgeneration -%}\n{{- '<|im_end|>\n' }}"
    ),
}


def _chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[role], "content": content} for role, content in turns]


def _maker(template: str, *, end: str = "<|im_end|>", stops: tuple[int, ...] = (), **settings: Any) -> SequenceMaker:
    tokenizer = templates.tokenizer(template, end=end)
    source = SourceConfig.model_validate({"path": "x.jsonl", **settings})
    return SequenceMaker(tokenizer, source=source, max_length=4096, stops=stops)


def _runs(maker: SequenceMaker, columns: dict[str, Any]) -> list[str]:
    made = maker.make(SourceRow(0, columns))
    assert isinstance(made, TokenSequence), made
    return [maker.tokenizer.decode(made.token_ids[start + 1 : stop + 1]) for start, stop in made.target_spans]


@pytest.mark.parametrize("name", MARKED)
def test_wherever_marks_begin_and_end_the_targets_are_the_turns_text_and_its_first_end_token(name: str) -> None:
    """All bytes of an emoji, white space before the end, the end outside the mark; no generation prompt, no user."""
    columns = {"messages": _chat(*TURNS)}
    assert _runs(_maker(MARKED[name]), columns) == ["hello 👍<|im_end|>", "bye\n<|im_end|>"]
    assert _runs(_maker(MARKED[name], loss_on="last_turn"), columns) == ["bye\n<|im_end|>"]
    assert _runs(_maker(PLAIN), columns) == ["hello 👍<|im_end|>", "bye\n<|im_end|>"]


@pytest.mark.parametrize("content", ["👍", "a👍", "👍\n", "é 你好", " ", "x  ", "<|im_start|>"])
def test_a_mark_keeps_every_token_of_what_it_surrounds(content: str) -> None:
    assert _runs(_maker(MARKED["round the content"]), {"messages": _chat(("u", "hi"), ("a", content))}) == [
        content + "<|im_end|>"
    ]


def test_a_mark_whose_last_token_is_number_0_ends_there() -> None:
    """transformers reads token 0 at the end of a mark as no token, and marks the rest of the chat."""
    maker = _maker(MARKED["round the content"])
    first = maker.tokenizer.convert_ids_to_tokens(0)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}, *_chat(*TURNS)]}
    assert _runs(maker, row)[0] == first + "<|im_end|>"
    assert "hi" not in "".join(_runs(maker, row))


def test_marks_may_leave_out_a_part_of_a_turn() -> None:
    template = _marked(
        _HEAD
        + "{{- m.content.split('#')[0] + '#' }}"
        + _OPEN
        + "{{- m.content.split('#')[1] + '<|im_end|>' }}"
        + _CLOSE
    )
    columns = {"messages": _chat(("u", "hi"), ("a", "draft#answer"))}
    assert _runs(_maker(template), columns) == ["answer<|im_end|>"]


def test_a_token_that_crosses_a_mark_rejects_its_row() -> None:
    """Two line ends are one token: one of them is the prompt's."""
    made = _maker(MARKED["round content and end"]).make(SourceRow(0, {"messages": _chat(("u", "hi"), ("a", "\nx"))}))
    assert isinstance(made, Reject)
    assert made.reason == "cannot_mark"


def test_a_mark_inside_of_a_mark_is_an_error() -> None:
    template = _marked(_HEAD + _OPEN + _OPEN + "{{- m.content }}" + _CLOSE + _CLOSE + "{{- '<|im_end|>\n' }}")
    with pytest.raises(TemplateCannotMark, match="inside of marks"):
        _runs(_maker(template), {"messages": _chat(*TURNS)})


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_marks_stand_in_for_the_proof_where_earlier_tools_are_moved() -> None:
    """Without marks it is refused: the tools stand before the last question only."""
    marked = MISTRAL.replace(
        "{{- ' ' + message.content + eos_token }}", _OPEN + "{{- ' ' + message.content + eos_token }}" + _CLOSE
    )
    columns = {"messages": _chat(("u", "hi"), ("a", "hello"), ("u", "and?"), ("a", "hello")), "tools": TOOLS}
    with pytest.raises(TemplateCannotMark):
        _runs(_maker(MISTRAL, end="</s>"), columns)
    assert _runs(_maker(marked, end="</s>"), columns) == [" hello</s>", " hello</s>"]
    assert _runs(_maker(marked, end="</s>", loss_on="last_turn"), columns) == [" hello</s>"]


def test_marks_that_hold_a_users_words_are_an_error_where_there_is_no_other_proof() -> None:
    marked = MISTRAL.replace(
        "{{- '[INST] ' + message.content + '[/INST]' }}",
        _OPEN + "{{- '[INST] ' + message.content + '[/INST]' }}" + _CLOSE,
    )
    columns = {"messages": _chat(*TURNS), "tools": TOOLS}
    with pytest.raises(TemplateCannotMark, match="no assistant's turn holds"):
        _runs(_maker(marked, end="</s>"), columns)


def test_a_message_of_weight_0_has_no_targets() -> None:
    messages = _chat(*TURNS)
    messages[1]["weight"] = 0
    assert _runs(_maker(PLAIN), {"messages": messages}) == ["bye\n<|im_end|>"]


# End tokens


def test_the_templates_own_end_of_turn_is_an_end_token_if_the_teacher_has_none_there() -> None:
    """ChatML on a base tokenizer, whose end of sequence is another token."""
    maker = _maker(PLAIN, end="</s>")
    ends = maker.tokenizer.convert_ids_to_tokens(list(maker.end_token_ids or ()))
    assert sorted(ends) == ["</s>", "<|im_end|>"]
    assert _runs(maker, {"messages": _chat(*TURNS)}) == ["hello 👍<|im_end|>", "bye\n<|im_end|>"]


def test_a_teachers_end_token_ends_a_turn_also_as_the_next_roles_token() -> None:
    template = (
        "{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}{#- <|user|><|assistant|> #}"
    )
    bare = _maker(template, end="</s>")
    user = bare.tokenizer.convert_tokens_to_ids("<|user|>")
    columns = {"messages": _chat(*TURNS)}
    assert _runs(_maker(template, end="</s>", stops=(user,)), columns) == ["hello 👍<|user|>", "bye\n"]
    assert _runs(bare, columns) == ["hello 👍", "bye\n"]


def test_an_end_that_the_template_writes_in_history_only_is_no_target() -> None:
    """The teacher would write another token there."""
    template = PLAIN.replace(
        "'<|im_end|>\n'", "('<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>')"
    )
    assert _runs(_maker(template + "{#- <|im_end|> #}", end="<|return|>"), {"messages": _chat(*TURNS)}) == [
        "hello 👍",
        "bye\n<|return|>",
    ]


def test_text_after_a_turn_without_an_end_token_is_refused() -> None:
    template = "{%- for m in messages %}{{- m.role + ': ' + m.content + ' (reminder)\n' }}{%- endfor %}"
    with pytest.raises(TemplateCannotMark, match="reminder"):
        _runs(_maker(template), {"messages": _chat(("u", "hi"), ("a", "hello"))})


# Errors


@pytest.mark.parametrize(
    ("loss_on", "advice"), [("assistant", "source.loss_on to last_turn or all"), ("last_turn", "source.loss_on to all")]
)
def test_the_error_shows_where_the_texts_part_and_advises_another_setting(loss_on: str, advice: str) -> None:
    template = "{% for m in messages %}{{ m.content if loop.last else '~' ~ m.content }}</s>{% endfor %}"
    with pytest.raises(TemplateCannotMark) as raised:
        _runs(_maker(template, end="</s>", loss_on=loss_on), {"messages": _chat(("u", "h\x1bi"), ("a", "x"))})
    assert advice in raised.value.fix
    assert f"to {loss_on}" not in raised.value.fix
    found = str(raised.value.found)
    assert 'one has "h␛i</s>"' in found
    assert 'the whole chat "~h␛i</s>x</s>"' in found


def test_one_odd_row_among_the_checked_ones_does_not_refuse_the_source_and_a_source_of_them_is_refused() -> None:
    good = SourceRow(0, {"messages": _chat(("u", "hi"), ("a", "hello"))})
    odd = SourceRow(1, {"messages": _chat(("u", "hi"), ("a", "hello"), ("u", "and?"), ("a", "bye")), "tools": TOOLS})
    maker = _maker(MISTRAL, end="</s>")
    maker.check([odd, good, odd])
    with pytest.raises(TemplateCannotMark):
        maker.check([odd, odd])
    made = list(maker.sequences([odd, good]))
    assert isinstance(made[0], Reject)
    assert made[0].reason == "template_cannot_mark"
    assert isinstance(made[1], TokenSequence)


def test_the_prompt_in_mode_generate_is_what_the_targets_follow() -> None:
    """The same tokens: a student that learns from answers and one that learns from chats see one prompt."""
    row = SourceRow(0, {"messages": _chat(("u", "hi"), ("a", "hello"))})
    tokenizer: PreTrainedTokenizerFast = templates.tokenizer(QWEN25)
    source = SourceConfig(path="x.jsonl")
    scored, prompt = (
        SequenceMaker(tokenizer, source=source, max_length=99, mode=mode).make(row) for mode in ("score", "generate")
    )
    assert isinstance(scored, TokenSequence)
    assert isinstance(prompt, TokenSequence)
    first = int(scored.target_spans[0, 0]) + 1
    assert scored.token_ids[:first].tolist() == prompt.token_ids.tolist()


def test_a_template_file_with_marks_is_used_like_the_tokenizers_own(tmp_path: Path) -> None:
    path = tmp_path / "marked.jinja"
    path.write_text(MARKED["round the content"])
    assert _runs(_maker(PLAIN, chat_template=str(path)), {"messages": _chat(*TURNS)}) == [
        "hello 👍<|im_end|>",
        "bye\n<|im_end|>",
    ]


@pytest.mark.parametrize("side", ["row", "teacher"])
def test_the_turns_of_a_chat_that_is_too_long_are_not_looked_for(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """Each turn takes renderings of all that precedes it: the time would grow with the square of their number."""
    rendered: list[int] = []
    apply = ChatTemplate.apply

    def counting(template: ChatTemplate, messages: list[dict[str, Any]], *arguments: Any, **options: Any) -> Any:
        rendered.append(len(messages))
        return apply(template, messages, *arguments, **options)

    monkeypatch.setattr(ChatTemplate, "apply", counting)
    source = SourceConfig(path="x.jsonl", **({"teacher_messages": "theirs"} if side == "teacher" else {}))
    maker = SequenceMaker(templates.tokenizer(QWEN25), source=source, max_length=256)
    turn = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    columns = {"messages": turn if side == "teacher" else turn * 200, "theirs": turn * 200}
    made = maker.make(SourceRow(0, columns))
    assert isinstance(made, Reject)
    assert made.reason == ("teacher_over_long" if side == "teacher" else "over_long")
    assert sum(rendered) < 10 * 400


@pytest.mark.parametrize("template", [QWEN25, MARKED["round content and end"]], ids=["proven", "marked"])
def test_of_a_chat_that_is_cut_only_the_turns_before_the_cut_are_looked_for(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is found by rendering all that precedes it: the time grows with the square of the turns."""
    renders, render = [], ChatTemplate.render

    def counted(self: ChatTemplate, messages: Any, *values: Any, **options: Any) -> str:
        renders.append(len(messages))
        return render(self, messages, *values, **options)

    tokenizer = templates.tokenizer(template, end="<|im_end|>")
    source = SourceConfig.model_validate({"path": "x.jsonl", "over_long": "cut"})
    counts = []
    for turns in (15, 45):
        chat = _chat(*([("u", "and then?"), ("a", "one more answer")] * turns))
        row = SourceRow(0, {"id": "a", "messages": chat})
        (whole,) = SequenceMaker(tokenizer, source=source, max_length=100_000, stops=()).sequences([row])
        monkeypatch.setattr(ChatTemplate, "render", counted)
        renders.clear()
        (cut,) = SequenceMaker(tokenizer, source=source, max_length=100, stops=()).sequences([row])
        monkeypatch.undo()
        assert isinstance(whole, TokenSequence)
        assert isinstance(cut, TokenSequence)
        assert cut.token_ids.tolist() == whole.token_ids[:100].tolist()
        wanted = [(start, min(stop, 100)) for start, stop in whole.target_spans.reshape(-1, 2).tolist() if start < 100]
        assert cut.target_spans.reshape(-1, 2).tolist() == [list(span) for span in wanted]
        counts.append(len(renders))
    assert counts[0] == counts[1] < 60
