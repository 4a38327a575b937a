"""Laws of what a chat template leaves out: every part of a chat stands in its rendered text, or its row is rejected."""

from __future__ import annotations

import json
import os
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from coldstill.pipeline.errors import TemplateDrops
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.kept_text import arguments_stand
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch
from coldstill.storage_schema.manifest import seal
from tests import making
from tests.pipeline.capturing import capture_config, contents, do_units
from tests.pipeline.sources import dropping_templates as dropping
from tests.pipeline.sources import templates
from tests.pipeline.sources.dropping_templates import (
    CHATML_JSON_CALLS,
    DATED,
    DEEPSEEK_TEXT_CALLS,
    DEVELOPER_IGNORED,
    FIRST_CALL_ONLY,
    GEMMA_PARTS,
    LLAMA31_PLAIN,
    NO_SYSTEM,
    NO_TOOL_RESULTS,
    XML_CALLS,
)

ARGUMENTS = {"city": "Zürich", "days": 3, "options": {"unit": None, "exact": True}}
CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
AS_TEXT = {"type": "function", "function": {"name": "add", "arguments": json.dumps(ARGUMENTS)}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
USER = {"role": "user", "content": "1 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 3."}
FOX = "the quick brown fox jumps"
RESULT = {"role": "tool", "content": "3"}


def _called(call: dict[str, Any] = CALL, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call], **fields}


def _maker(template: str, *, mode: Any = "score", **settings: Any) -> SequenceMaker:
    tokenizer = templates.tokenizer(template, end=dropping.ENDS.get(template, "<|im_end|>"))
    return SequenceMaker(tokenizer, source=SourceConfig(path="x.jsonl", **settings), max_length=4096, mode=mode)


def _made(maker: SequenceMaker, *messages: dict[str, Any], **columns: Any) -> TokenSequence | Reject:
    return maker.make(SourceRow(0, {"messages": list(messages), **columns}))


def _text(maker: SequenceMaker, *messages: dict[str, Any], **columns: Any) -> str:
    made = _made(maker, *messages, **columns)
    assert isinstance(made, TokenSequence), made
    return str(maker.tokenizer.decode(made.token_ids))


DROPPED = {
    "a call": (LLAMA31_PLAIN, [USER, _called()], "tool_calls", "add"),
    "the second call": (FIRST_CALL_ONLY, [USER, _called(tool_calls=[CALL, CALL])], "tool_calls", "call 1"),
    "a tool's result": (NO_TOOL_RESULTS, [USER, _called(), RESULT, ANSWER], "tool_results", "'3'"),
    "the system's text": (NO_SYSTEM, [{"role": "system", "content": "be kind"}, USER, ANSWER], "system", "be kind"),
    "the developer's text": (
        DEVELOPER_IGNORED,
        [{"role": "developer", "content": "be kind"}, USER, ANSWER],
        "developer",
        "be kind",
    ),
    "the text beside a call": (
        DEEPSEEK_TEXT_CALLS.replace("message['content'] is none", "message['tool_calls']"),
        [USER, _called(content="let me see")],
        "text_beside_calls",
        "let me see",
    ),
    "reasoning": (CHATML_JSON_CALLS, [USER, {**ANSWER, "reasoning_content": "easy"}], "reasoning", "easy"),
    "reasoning of another name": (CHATML_JSON_CALLS, [USER, {**ANSWER, "thinking": "easy"}], "reasoning", "easy"),
    "inline reasoning": (
        CHATML_JSON_CALLS.replace("{{- message.content }}", "{{- message.content.split('</think>')[-1] }}"),
        [USER, {"role": "assistant", "content": "<think>easy</think>It is 3."}],
        "reasoning",
        "easy",
    ),
    "half of a long text": (
        CHATML_JSON_CALLS.replace("{{- message.content }}", "{{- message.content[:30] }}"),
        [{"role": "user", "content": "one two three " * 9}, ANSWER],
        "text",
        "one two",
    ),
    "a text that another one holds": (
        CHATML_JSON_CALLS.replace("{{- message.content }}", "{{- message.content if message.role == 'user' }}"),
        [{"role": "user", "content": f"Say: {FOX}"}, {**ANSWER, "content": FOX}],
        "text",
        "message 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_a_part_that_the_template_leaves_out_rejects_its_row_by_name(name: str) -> None:
    template, messages, kind, what = DROPPED[name]
    made = _made(_maker(template, loss_on="all"), *messages)
    assert isinstance(made, Reject)
    assert made.reason == "template_drops"
    assert what in made.detail
    if kind != "text":
        assert isinstance(_made(_maker(template, loss_on="all", may_drop=[kind]), *messages), TokenSequence)


@pytest.mark.parametrize("name", ["a call", "a tool's result", "the system's text", "the developer's text"])
def test_prompts_lose_nothing_either(name: str) -> None:
    template, messages, _, _ = DROPPED[name]
    made = _made(_maker(template, mode="generate"), *messages, USER)
    assert isinstance(made, Reject)
    assert made.reason == "template_drops"


def test_tools_that_the_template_does_not_show_are_noticed() -> None:
    made = _made(_maker(LLAMA31_PLAIN), USER, ANSWER, tools=TOOLS)
    assert isinstance(made, Reject)
    assert (made.reason, made.detail) == ("template_drops", "tool add")
    assert isinstance(_made(_maker(LLAMA31_PLAIN, may_drop=["tools"]), USER, ANSWER, tools=TOOLS), TokenSequence)


def test_short_texts_are_not_found_by_chance() -> None:
    """The result 3 stands in the answer too, and the call's name in the list of tools."""
    for template, messages in (
        (NO_TOOL_RESULTS, [USER, _called(), RESULT, {**ANSWER, "content": "3 3 3"}]),
        (CHATML_JSON_CALLS.replace("message.tool_calls or []", "[]"), [USER, _called({"name": "add"})]),
    ):
        made = _made(_maker(template, loss_on="all"), *messages, tools=TOOLS)
        assert isinstance(made, Reject), template
        assert made.reason == "template_drops"


KEPT = {
    "the reasoning of an earlier turn": (
        templates.QWEN3,
        [USER, {"role": "assistant", "content": "<think>\neasy\n</think>\n\n3"}, USER, ANSWER],
    ),
    "white space at the edges": (LLAMA31_PLAIN, [{"role": "user", "content": "\n hi \n"}, ANSWER]),
    "a result that is encoded as JSON": (
        CHATML_JSON_CALLS.replace(
            "{{- message.content }}", "{{- message.content | tojson if message.role == 'tool' else message.content }}"
        ),
        [USER, _called(), {"role": "tool", "content": 'a "quoted"\nline of a longer result'}, ANSWER],
    ),
    "a call in XML": (XML_CALLS, [USER, _called()]),
    "a call in XML from JSON text": (XML_CALLS, [USER, _called(AS_TEXT)]),
    "reasoning of another name": (templates.QWEN3, [USER, {**ANSWER, "reasoning": "easy"}]),
    "the developer's text as the system's": (
        CHATML_JSON_CALLS,
        [{"role": "developer", "content": "be kind"}, USER, ANSWER],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_family_changes_on_purpose_is_not_lost(name: str) -> None:
    template, messages = KEPT[name]
    assert isinstance(_made(_maker(template, loss_on="last_turn"), *messages), TokenSequence)


def test_a_developers_text_is_the_systems_where_the_template_knows_no_developer() -> None:
    maker = _maker(CHATML_JSON_CALLS)
    developer = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER, ANSWER]
    assert _text(maker, *developer) == _text(maker, {"role": "system", "content": "a\n\nb"}, USER, ANSWER)


@pytest.mark.parametrize("template", [CHATML_JSON_CALLS, DEEPSEEK_TEXT_CALLS, XML_CALLS])
@pytest.mark.parametrize("content", [None, ""])
def test_arguments_as_json_text_are_rendered_like_their_value(template: str, content: str | None) -> None:
    maker = _maker(template)
    as_value, as_text = (_text(maker, USER, _called(call, content=content)) for call in (CALL, AS_TEXT))
    if template != DEEPSEEK_TEXT_CALLS:  # shows the text as it was written
        assert as_text == as_value
        assert "Zürich" in as_text
    for text in (as_value, as_text):
        assert r"\"" not in text
        assert arguments_stand(ARGUMENTS, text)
        assert "None" not in text


def test_arguments_that_are_encoded_twice_do_not_stand() -> None:
    once, twice = json.dumps(ARGUMENTS), json.dumps(json.dumps(ARGUMENTS))
    assert arguments_stand(once, f'{{"name": "add", "arguments": {once}}}')
    assert not arguments_stand(once, f'{{"name": "add", "arguments": {twice}}}')
    assert arguments_stand("{}", '{"arguments": {}}')
    assert not arguments_stand("{}", '{"arguments": "{}"}')


def test_a_call_without_arguments_has_none() -> None:
    for given in (None, "", {}, "{}"):
        text = _text(_maker(CHATML_JSON_CALLS), USER, _called({"function": {"name": "add", "arguments": given}}))
        assert '"arguments": {}}' in text


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", [1]])
def test_arguments_that_are_no_object_are_rejected_by_name(arguments: object) -> None:
    made = _made(_maker(CHATML_JSON_CALLS), USER, _called({"function": {"name": "add", "arguments": arguments}}))
    assert isinstance(made, Reject)
    assert made.reason == "bad_messages"
    assert "arguments of call 0 of message 1" in made.detail


def test_null_arguments_that_the_tool_does_not_declare_come_from_a_typed_column() -> None:
    parameters = {"type": "object", "properties": {"unit": {"type": ["string", "null"]}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    call = {"function": {"name": "add", "arguments": {"unit": None, "of_another_tool": None}}}
    maker = _maker(CHATML_JSON_CALLS)
    assert '"arguments": {"unit": null}}' in _text(maker, USER, _called(call), tools=tools)
    assert '"arguments": {"unit": null, "of_another_tool": null}}' in _text(maker, USER, _called(call))


PARTS = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]


@pytest.mark.parametrize("template", [LLAMA31_PLAIN, CHATML_JSON_CALLS, DEEPSEEK_TEXT_CALLS, templates.QWEN3])
def test_parts_of_text_are_joined_where_the_template_wants_text(template: str) -> None:
    maker = _maker(template)
    whole = [{"role": "user", "content": "hi\nyou"}, ANSWER]
    assert _text(maker, {"role": "user", "content": PARTS}, ANSWER) == _text(maker, *whole)
    answer = {"role": "assistant", "content": PARTS}
    assert _text(maker, USER, answer) == _text(maker, USER, {"role": "assistant", "content": "hi\nyou"})


def test_parts_stay_parts_where_the_template_reads_them() -> None:
    text = _text(_maker(GEMMA_PARTS), {"role": "user", "content": PARTS}, ANSWER)
    assert "hiyou" in text


def test_a_part_that_is_not_text_is_rejected_by_name() -> None:
    made = _made(_maker(GEMMA_PARTS), {"role": "user", "content": [{"type": "image"}, *PARTS]}, ANSWER)
    assert isinstance(made, Reject)
    assert (made.reason, made.detail) == ("bad_messages", "part 0 of message 0 is of type image: only text is captured")


def test_a_template_that_drops_the_same_part_of_all_first_rows_is_an_error_with_the_setting(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(making.CHAT_TEMPLATE)
    config = capture_config(tmp_path, source={"chat_template": str(template)})
    making.write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, {**ANSWER, "reasoning": "easy"}]}] * 40)
    with pytest.raises(TemplateDrops, match=r"source\.may_drop: \[reasoning\]"):
        prepare(config)
    assert not Path(config.output).exists()
    rows = [{"messages": [USER, ANSWER]}, *[{"messages": [USER, {**ANSWER, "reasoning": "easy"}]}] * 39]
    making.write_jsonl(tmp_path / "rows.jsonl", rows)
    prepare(config)
    accepted = capture_config(
        tmp_path, output="accepted", source={"chat_template": str(template), "may_drop": ["reasoning"]}
    )
    making.write_jsonl(tmp_path / "rows.jsonl", rows[1:])
    prepare(accepted)


def test_no_setting_accepts_the_loss_of_a_turns_text(tmp_path: Path) -> None:
    template = tmp_path / "first.jinja"
    template.write_text("{{ messages[0].content }}")
    with pytest.raises(TemplateDrops) as caught:
        prepare(capture_config(tmp_path, source={"chat_template": str(template), "loss_on": "all"}))
    assert "may_drop" not in str(caught.value)


class _Clock(date):
    """A clock that a test sets."""

    now_is = date(2026, 11, 28)

    @classmethod
    def today(cls) -> date:  # type: ignore[override]
        return cls.now_is


class _NoClock(datetime):
    @classmethod
    def now(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError("the chat template read the clock")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[_Clock]:
    monkeypatch.setattr("coldstill.pipeline.prepare.date", _Clock)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", _NoClock)
    monkeypatch.setattr(_Clock, "now_is", date(2026, 11, 28))
    return _Clock


def _dated(folder: Path, output: str, **source: Any) -> Any:
    template = folder / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y, %H:%M') }}" + making.CHAT_TEMPLATE)
    return capture_config(folder, output=output, source={"chat_template": str(template), **source}, rows_per_unit=10)


def test_a_capture_over_midnight_equals_an_unbroken_one(tmp_path: Path, clock: type[_Clock]) -> None:
    from coldstill.pipeline.worker import CaptureWorker

    whole, broken = _dated(tmp_path, "whole"), _dated(tmp_path, "broken")
    prepared = prepare(whole)
    do_units(whole)
    seal(prepared.store)
    assert prepared.header.about.template_date == "2026-11-28"
    prepare(broken)
    CaptureWorker(broken).run(0)
    clock.now_is = date(2026, 11, 29)
    again = prepare(broken)
    do_units(broken)
    seal(again.store)
    assert again.header == prepared.header
    assert contents(broken.output) == contents(whole.output)
    tokenizer = open_dataset(whole.output)
    assert tokenizer.header.chat_template_sha256 == prepared.header.chat_template_sha256


def test_the_settings_give_a_template_its_date(tmp_path: Path, clock: type[_Clock]) -> None:
    today, tomorrow = _dated(tmp_path, "a"), _dated(tmp_path, "b")
    fixed = _dated(tmp_path, "c", template_date="2026-11-28")
    first = prepare(today).header
    clock.now_is = date(2026, 11, 29)
    assert prepare(tomorrow).header.chat_template_sha256 != first.chat_template_sha256
    assert prepare(fixed).header == first
    with pytest.raises(HeaderMismatch, match="chat_template"):
        prepare(_dated(tmp_path, "b", template_date="2026-11-28"))


def test_only_templates_that_ask_for_a_date_get_one() -> None:
    day = date(2026, 11, 28)
    for template, arguments, wanted in (
        (CHATML_JSON_CALLS, {}, None),
        (DATED, {}, day),
        (DATED, {"date_string": "26 Jul 2024"}, None),
    ):
        tokenizer = templates.tokenizer(template, end="<|im_end|>")
        source = SourceConfig(path="x.jsonl", template_arguments=arguments)
        maker = SequenceMaker(tokenizer, source=source, max_length=4096, today=day)
        assert maker.template_date == wanted
        if wanted:
            assert "28 Nov 2026, 00:00" in _text(maker, USER, ANSWER)


REAL = os.environ.get("COLDSTILL_REAL_TOKENIZERS")
FAMILIES = {
    "llama3_1": {"calls": False, "system": True, "reasoning": False},
    "qwen2_5": {"calls": True, "system": True, "reasoning": False},
    "qwen3": {"calls": True, "system": True, "reasoning": True},
    "gemma3": {"calls": False, "system": True, "reasoning": False},
    "mistral_nemo": {"calls": True, "system": False, "reasoning": False},
    "deepseek_v3": {"calls": True, "system": True, "reasoning": False},
}


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="COLDSTILL_REAL_TOKENIZERS names no folder with tokenizers")
@pytest.mark.parametrize("family", FAMILIES)
def test_real_templates_keep_all_parts_or_are_refused(family: str) -> None:
    found = sorted(Path(str(REAL), family).rglob("tokenizer_config.json"))
    if not found:
        pytest.skip(f"no tokenizer of {family}")
    settings = json.loads(found[0].read_text())
    names = {name: settings[name] for name in ("bos_token", "eos_token") if settings.get(name)}
    special = {name: value if isinstance(value, str) else value["content"] for name, value in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(found[0].with_name("tokenizer.json")), **special)
    tokenizer.chat_template = settings["chat_template"]
    knows = FAMILIES[family]
    maker = SequenceMaker(tokenizer, source=SourceConfig(path="x.jsonl", loss_on="all"), max_length=4096)
    call, as_text = ({"id": "abcdefghi", **each} for each in (CALL, AS_TEXT))
    for wanted, messages in (
        (True, [USER, ANSWER]),
        (True, [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]),
        (knows["system"], [{"role": "system", "content": "be kind"}, USER, ANSWER]),
        (knows["calls"], [USER, _called(call)]),
        (knows["calls"], [USER, _called(as_text)]),
        (knows["reasoning"], [USER, {**ANSWER, "reasoning": "easy"}]),
    ):
        made = _made(maker, *messages)
        if not wanted:
            assert isinstance(made, Reject)
            assert made.reason == "template_drops"
            continue
        assert isinstance(made, TokenSequence), made
        text = tokenizer.decode(made.token_ids)
        for message in messages:
            for given in message.get("tool_calls", ()):
                assert arguments_stand(json.dumps(ARGUMENTS), text)
                assert given["function"]["name"] in text
