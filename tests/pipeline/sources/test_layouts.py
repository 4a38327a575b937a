"""Laws of sources as they come: layouts by their columns, JSON documents, folders, encodings, ids, useless sources."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.pipeline.capture import capture
from coldstill.pipeline.cluster import pool
from coldstill.pipeline.driver.status import read_status
from coldstill.pipeline.dry_run import dry_run
from coldstill.pipeline.errors import AllRowsRejected, DuplicateIds, SourceNotFound, SourceUnreadable
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.files import SourceRow, json_text, parse_row
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.tools.verify import verify
from tests import making, vision
from tests.pipeline.capturing import OneWorkerPool, capture_config, do_units
from tests.pipeline.sources import templates
from tests.pipeline.sources.templates import QWEN25

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]
SHAREGPT = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def _maker(*, mode: Any = "score", **settings: Any) -> SequenceMaker:
    return SequenceMaker(
        templates.tokenizer(QWEN25), source=SourceConfig(path="x.jsonl", **settings), max_length=4096, mode=mode
    )


def _text(columns: dict[str, Any], **settings: Any) -> str:
    maker = _maker(**settings)
    made = maker.make(SourceRow(0, columns))
    assert isinstance(made, TokenSequence), made
    return str(maker.tokenizer.decode(made.token_ids))


WHOLE = _text({"messages": CHAT})
PAIR = _text({"messages": CHAT[1:]})
LAYOUTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "ShareGPT": ({"conversations": SHAREGPT}, WHOLE, "ShareGPT: conversations -> messages"),
    "ShareGPT, system apart": ({"system": "be kind", "conversations": SHAREGPT[1:]}, WHOLE, "ShareGPT: system, "),
    "ShareGPT as messages": ({"messages": SHAREGPT}, WHOLE, "ShareGPT: messages"),
    "roles in capitals": ({"messages": [{**m, "role": m["role"].upper()} for m in CHAT]}, WHOLE, ""),
    "synonyms": ({"messages": [{**CHAT[1], "role": "human"}, {**CHAT[2], "role": "bot"}]}, PAIR, ""),
    "messages as JSON text": ({"messages": json.dumps(CHAT)}, WHOLE, ""),
    "alpaca": ({"instruction": "hi", "input": "", "output": "hello"}, PAIR, "alpaca: instruction, input, output"),
    "alpaca with its text": (
        {"instruction": "hi", "input": "", "output": "hello", "text": "Below is ..."},
        PAIR,
        "alpaca: ",
    ),
    "TRL, text": ({"prompt": "hi", "completion": "hello"}, PAIR, "prompt and completion: "),
    "TRL, messages": ({"prompt": CHAT[:2], "completion": CHAT[2:]}, WHOLE, "prompt and completion: "),
    "preference, text": ({"prompt": "hi", "chosen": "hello", "rejected": "no"}, PAIR, "preference pairs"),
    "preference, messages": ({"chosen": CHAT, "rejected": CHAT[:1]}, WHOLE, "preference pairs"),
    "preference, whole chats beside the prompt": (
        {"prompt": "hi", "chosen": CHAT[1:], "rejected": CHAT[1:]},
        PAIR,
        "preference pairs",
    ),
    "preference, prompt as messages": (
        {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": CHAT[2:]},
        WHOLE,
        "preference pairs",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_in_a_known_layout_is_the_chat_that_it_means(name: str) -> None:
    columns, wanted, said = LAYOUTS[name]
    maker = _maker()
    made = maker.make(SourceRow(0, {**columns, "topic": 1}))
    assert isinstance(made, TokenSequence), made
    assert maker.tokenizer.decode(made.token_ids) == wanted
    assert made.metadata.get("topic") == 1
    assert not {"rejected", "conversations", "output", "chosen"} & set(made.metadata)
    assert maker.layouts == () if not said else maker.layouts[0].startswith(said)


def test_the_input_of_alpaca_does_not_leave_the_prompt() -> None:
    columns = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    wanted = _text({"messages": [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}]})
    assert _text(columns) == wanted
    assert "1 and 2" in _text(columns, mode="generate")


def test_calls_and_results_of_sharegpt_are_calls_and_results() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    rows = [
        {"from": "human", "value": "1?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "the sum is 1"},
        {"from": "gpt", "value": "1!"},
    ]
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "the sum is 1"},
        {"role": "assistant", "content": "1!"},
    ]
    assert _text({"conversations": rows}) == _text({"messages": messages})


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": "[ ]"},
        {"messages": "[]", "tools": "[]"},
        *({"messages": [{"role": role, "content": [5]}, *CHAT[1:]]} for role in ("user", "context")),
        *({"instruction": "a", "output": "b", "history": given} for given in ("1900", 5, [["a"]], [None], {"a": 1})),
    ],
)
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_a_layout_that_holds_something_else_rejects_its_row(columns: dict[str, Any], mode: str) -> None:
    made = _maker(mode=mode).make(SourceRow(0, columns))
    assert isinstance(made, Reject)
    assert made.reason == "bad_messages"


HALF = "x\ud83d"
"""Half of a surrogate pair, which JSON text may hold as an escape."""


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": json.dumps([{"role": "user", "content": HALF}, *CHAT[2:]])},
        {"messages": json.dumps([*CHAT[:2], {"role": "assistant", "content": HALF}])},
        {"messages": CHAT, "tools": json.dumps([{"type": "function", "function": {"name": HALF}}])},
        {"messages": [*CHAT, {"role": "assistant", "tool_calls": json.dumps({"name": HALF, "arguments": {}})}]},
        {"messages": [*CHAT, {"role": "assistant", "tool_calls": {"name": "f", "arguments": json.dumps({"a": HALF})}}]},
    ],
)
def test_half_of_a_surrogate_pair_in_json_text_of_a_column_rejects_its_row(columns: dict[str, Any]) -> None:
    """The row's own JSON holds the escape's six characters, so it is text before the column is parsed."""
    made = _maker().make(SourceRow(0, columns))
    assert isinstance(made, Reject)
    assert made.reason == "lone_surrogate"
    made.detail.encode()


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"x": 1}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("part", "as_text"),
    [("arguments", False), ("arguments", True), ("tools", False), ("tools", True), ("another field", False)],
)
def test_a_chat_that_is_nested_deeper_than_pythons_stack_rejects_its_row(part: str, as_text: bool) -> None:
    def chat(levels: int) -> TokenSequence | Reject:
        value: Any = _nested(levels)
        tools = [{"type": "function", "function": {"name": "f", "parameters": value}}]
        given = json.dumps(value) if as_text else value
        columns: dict[str, Any] = {
            "arguments": {"messages": [*CHAT, {"role": "assistant", "tool_calls": {"name": "f", "arguments": given}}]},
            "tools": {"messages": CHAT, "tools": json.dumps(tools) if as_text else tools},
            "another field": {"messages": [*CHAT[:1], {**CHAT[1], "more": given}, *CHAT[2:]]},
        }[part]
        return _maker().make(SourceRow(0, columns))

    assert isinstance(chat(60), TokenSequence)
    made = chat(700)
    assert isinstance(made, Reject)
    assert made.reason == ("bad_tools" if part == "tools" else "bad_messages")
    assert "nested deeper" in made.detail


def test_a_date_in_the_arguments_of_a_call_is_a_string_wherever_the_rows_lie(tmp_path: Path) -> None:
    """A typed column of Parquet has dates; the staged copy of a source has them as strings."""
    given = {"name": "f", "arguments": {"on": datetime(2026, 1, 2)}}
    chats = [[*CHAT, {"role": "assistant", "content": "", "tool_calls": [given]}]]
    pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "x.parquet")
    (row,) = open_source(SourceConfig(path=str(tmp_path / "x.parquet"))).rows()
    made, staged = _maker().make(row), _maker().make(parse_row(0, json_text(row.columns)))
    assert isinstance(made, TokenSequence)
    assert isinstance(staged, TokenSequence)
    assert made.token_ids.tolist() == staged.token_ids.tolist()


def test_the_history_of_alpaca_may_be_json_text() -> None:
    row = {"instruction": "a", "output": "b"}
    pairs = [["q", "r"], ["s", "t"]]
    assert _text({**row, "history": json.dumps(pairs)}) == _text({**row, "history": pairs})
    assert _text({**row, "history": ""}) == _text({**row, "history": "[]"}) == _text(row)


def test_explicit_settings_win() -> None:
    columns = {"conversations": SHAREGPT, "q": "a", "a": "b", "body": "plain"}
    assert "<|im_start|>user\na<|im_end|>" in _text(columns, prompt="q", response="a")
    assert _text(columns, text="body") == "plain"


def test_columns_that_nothing_recognizes_are_named_with_the_key_to_set(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    making.write_jsonl(tmp_path / "rows.jsonl", [{"dialog": "x", "meta": 1}] * 3)
    with pytest.raises(AllRowsRejected, match=r"(?s)3 no_messages.*columns found: dialog, meta.*source\.messages"):
        prepare(config)
    with pytest.raises(AllRowsRejected, match="no_messages"):
        dry_run(config, progress=False)
    assert not Path(config.output).exists()


def test_images_that_are_nowhere_are_rejected_with_the_keys_that_say_where(tmp_path: Path) -> None:
    vision.idefics3_model(tmp_path / "teacher")
    config = capture_config(tmp_path)
    making.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "<image> what?", "response": "a", "image": "x.png"}] * 3)
    wanted = r"(?s)3 image_not_found.*'x.png': No such file.*source\.image_root.*source\.image_hosts"
    with pytest.raises(AllRowsRejected, match=wanted):
        prepare(config)
    making.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "<image> what?", "response": "a", "picture": "x.png"}] * 3)
    with pytest.raises(AllRowsRejected, match=r"(?s)source\.images names.*columns found: prompt, response, picture"):
        prepare(config)


def test_the_layout_is_said_in_the_summary(tmp_path: Path) -> None:
    config = capture_config(tmp_path)
    making.write_jsonl(tmp_path / "rows.jsonl", [{"conversations": SHAREGPT}] * 3)
    assert dry_run(config, progress=False).lines()["read as"] == "ShareGPT: conversations -> messages"
    assert prepare(config).layouts == ("ShareGPT: conversations -> messages",)


ROWS = [{"id": str(n), "text": f"row {n}"} for n in range(7)]


@pytest.mark.parametrize("name", ["x.json", "x.JSON", "x.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_json_file_may_be_one_array(tmp_path: Path, name: str, indent: int | None, wrapped: bool) -> None:
    import gzip

    data = json.dumps({"data": ROWS} if wrapped else ROWS, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = open_source(SourceConfig(path=str(tmp_path / name)))
    assert [row.columns for row in source.rows()] == ROWS
    assert [row.columns for unit in source.plan(3) for row in source.read(unit)] == ROWS


@pytest.mark.parametrize("lines", [ROWS, ROWS[:1], [{"data": 1}, *ROWS]])
def test_a_json_file_of_lines_stays_lines(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    making.write_jsonl(tmp_path / "x.json", lines)
    assert [row.columns for row in open_source(SourceConfig(path=str(tmp_path / "x.json"))).rows()] == lines


def test_a_document_without_rows_is_an_error_that_names_its_keys(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "rows": ROWS}, indent=1))
    with pytest.raises(SourceUnreadable, match="version, rows"):
        list(open_source(SourceConfig(path=str(tmp_path / "x.json"))).rows())


def test_a_folder_is_its_files_and_endings_may_be_in_capitals(tmp_path: Path) -> None:
    making.write_jsonl(tmp_path / "a.JSONL", ROWS[:3])
    making.write_jsonl(tmp_path / "b.jsonl", ROWS[3:])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("x")
    assert [row.columns for row in open_source(SourceConfig(path=str(tmp_path))).rows()] == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFound, match="a folder without"):
        open_source(SourceConfig(path=str(tmp_path / "empty")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_another_encoding_than_utf8_is_named_before_any_row_is_read(tmp_path: Path, encoding: str, name: str) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS) if name == "x.jsonl" else json.dumps(ROWS)
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(SourceUnreadable, match="UTF-"):
        open_source(SourceConfig(path=str(tmp_path / name))).plan(3)


def test_a_byte_order_mark_of_utf8_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes("\n".join(json.dumps(row) for row in ROWS).encode("utf-8-sig"))
    assert [row.columns for row in open_source(SourceConfig(path=str(tmp_path / "x.jsonl"))).rows()] == ROWS


def test_lines_that_are_no_text_are_rejected_by_name(tmp_path: Path) -> None:
    lines = [
        b'{"text": "caf\xe9"}',
        '{"text": "é"}'.encode("utf-16-le"),
        b'{"text": "\\ud800"}',
        b'{"text": "\\ud83d\\ude00"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([b'{"text": "first"}', *lines]))
    rows = open_source(SourceConfig(path=str(tmp_path / "x.jsonl"))).rows()
    made = list(_maker().sequences(rows))
    assert [result.reason for result in made if isinstance(result, Reject)] == [
        "not_utf8",
        "not_utf8",
        "lone_surrogate",
    ]
    assert isinstance(made[-1], TokenSequence)


@pytest.mark.parametrize("format_name", ["jsonl", "parquet"])
def test_duplicate_ids_are_refused_or_numbered_by_choice(tmp_path: Path, format_name: str) -> None:
    rows = [{"id": f"q{n % 6}", "messages": CHAT} for n in range(8)]
    path = tmp_path / f"source.{format_name}"
    if format_name == "jsonl":
        making.write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    refused = capture_config(tmp_path, source={"path": str(path)})
    for start in (prepare, dry_run):
        with pytest.raises(DuplicateIds, match=r"(?s)2 ids.*'q0' 2 times.*duplicate_ids"):
            start(refused)
    numbered = capture_config(tmp_path, source={"path": str(path), "duplicate_ids": "number"})
    prepare(numbered)
    made = SequenceMaker.of(numbered).sequences(open_source(numbered.source).rows())
    assert [row.sample_id for row in made] == [f"q{n % 6}#{n}" for n in range(8)]


def test_a_capture_without_a_usable_row_ends_with_the_reasons_and_seals_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "WorkerPool", OneWorkerPool)
    config = capture_config(tmp_path, source={"adapter": "tests.pipeline.sources.test_adapter:give_nothing"})
    with pytest.raises(AllRowsRejected, match=r"(?s)41 adapter_dropped.*row 0"):
        capture(config)
    assert not Path(config.output, MANIFEST_NAME).exists()
    with pytest.raises(AllRowsRejected, match="41 adapter_dropped"):
        capture(config)


def test_reject_reasons_stand_in_summary_and_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WorkerPool", OneWorkerPool)
    config = capture_config(tmp_path)
    summary = capture(config)
    assert (summary.rejected, summary.reject_reasons) == (1, {"no_messages": 1})
    assert read_status(config.output).rejected == {"no_messages": 1}
    assert capture(config).reject_reasons == {"no_messages": 1}
    assert len(open_dataset(config.output)) == 40


@pytest.mark.parametrize("marked", [False, True])
def test_a_turn_of_weight_0_is_not_learned(tmp_path: Path, marked: bool) -> None:
    from transformers import AutoTokenizer

    template = making.CHAT_TEMPLATE
    if not marked:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (tmp_path / "t.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(making.chat_model(tmp_path / "m"))
    chat = [CHAT[1], {**CHAT[2], "weight": 0}, CHAT[1], {**CHAT[2], "content": "bye", "weight": 1}]
    for loss_on, wanted in (("assistant", ["bye</s>"]), ("last_turn", ["bye</s>"])):
        source = SourceConfig(path="x.jsonl", chat_template=str(tmp_path / "t.jinja"), loss_on=loss_on)  # type: ignore[arg-type]
        made = SequenceMaker(tokenizer, source=source, max_length=512).make(SourceRow(0, {"messages": chat}))
        assert isinstance(made, TokenSequence)
        assert [tokenizer.decode(made.token_ids[start + 1 : stop + 1]) for start, stop in made.target_spans] == wanted


def test_deep_verification_names_duplicate_ids_of_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an adapter makes them, whose ids are not known before it runs."""
    making.write_jsonl(tmp_path / "twice.jsonl", [{"id": f"q{n % 6}", "messages": CHAT} for n in range(8)])
    found = {}
    for choice in ("number", "refuse"):
        source = {"path": str(tmp_path / "twice.jsonl"), "duplicate_ids": choice}
        config = capture_config(tmp_path, output=choice, source=source)
        monkeypatch.setattr("coldstill.pipeline.prepare.require_unique_ids", lambda *_: None)
        store = prepare(config).store
        do_units(config)
        seal(store)
        found[choice] = [finding.line for finding in verify(config.output, deep=True, progress=False)]
        assert verify(config.output, progress=False) == []
    assert found["number"] == []
    assert len(found["refuse"]) == 1
    assert "2 ids that several rows have, such as 'q0' 2 times" in found["refuse"][0]
