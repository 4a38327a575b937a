"""The filter language: compared with plain Python, and errors that name the position."""

from __future__ import annotations

import json
import operator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.errors import InvalidRow, ShardDamaged
from coldstill.storage_schema.shard import SCHEMA
from coldstill.tools.derive.subset import MAX_FILTER_LENGTH, Filter, parse_filter, selection
from coldstill.tools.errors import InvalidFilter

OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text(max_size=3)


def _batch(metadata: list[str], ids: list[str] | None = None, spans: list[int] | None = None) -> pa.RecordBatch:
    rows = [
        {
            "sample_id": ids[number] if ids else f"row-{number}",
            "token_ids": [1] * (number + 2),
            "target_spans": spans or [0, number + 1],
            "metadata": text,
            "media": [],
            **dict.fromkeys(STREAMS, b"never a frame"),
        }
        for number, text in enumerate(metadata)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _matches(text: str, documents: list[Any], ids: list[str] | None = None) -> list[bool]:
    mask = selection([parse_filter(text)])(_batch([json.dumps(document) for document in documents], ids))
    assert mask.dtype == bool
    return mask.tolist()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("tokens<=512", Filter(("tokens",), "<=", 512)),
        ("  targets  >  1.5 ", Filter(("targets",), ">", 1.5)),
        ("metadata.topic == math", Filter(("metadata", "topic"), "==", "math")),
        ('metadata.topic == "3"', Filter(("metadata", "topic"), "==", "3")),
        ("metadata.a.b-c != null", Filter(("metadata", "a", "b-c"), "!=", None)),
        ("metadata.t == two words", Filter(("metadata", "t"), "==", "two words")),
        ("metadata.t == [1, 2]", Filter(("metadata", "t"), "==", [1, 2])),
        ("metadata.t == NaN", Filter(("metadata", "t"), "==", "NaN")),
        ("sample_id == 17", Filter(("sample_id",), "==", "17")),
        ("sample_id ~ ^chat-", Filter(("sample_id",), "~", "^chat-")),
        ("metadata.t ~ 5", Filter(("metadata", "t"), "~", "5")),
        ("metadata.t ~ a == b", Filter(("metadata", "t"), "~", "a == b")),
    ],
)
def test_a_filter_is_key_op_value(text: str, parsed: Filter) -> None:
    assert parse_filter(text) == parsed


@pytest.mark.parametrize(
    ("text", "place", "wanted"),
    [
        ("", 1, "sample_id, tokens"),
        ("  ", 3, "sample_id, tokens"),
        ("token < 5", 1, "sample_id, tokens"),
        ("metadata == 5", 1, "metadata.KEY"),
        ("metadata. == 5", 1, "metadata.KEY"),
        ("metadata.a..b == 5", 1, "metadata.KEY"),
        ("tokens.x == 5", 1, "sample_id, tokens"),
        ("__import__('os') == 5", 1, "sample_id, tokens"),
        ("tokens", 7, "== != < <= > >= or ~"),
        ("tokens = 5", 8, "== != < <= > >= or ~"),
        ("metadata.a is 5", 12, "== != < <= > >= or ~"),
        ("tokens <", 9, "a value"),
        ("tokens < many", 10, "with a number"),
        ("tokens ~ 5", 8, "with a number"),
        ("targets == true", 12, "with a number"),
        ("metadata.a < null", 14, "a number or a text"),
        ("metadata.a < [1]", 14, "a number or a text"),
        ("sample_id ~ (", 13, "regular expression"),
        (r"sample_id ~ (a)\1", 13, "regular expression"),
        ("sample_id ~ ((a{1000}){1000}){1000}", 13, "regular expression"),
    ],
)
def test_the_error_of_a_bad_filter_has_its_place_and_an_example(text: str, place: int, wanted: str) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(text)
    assert f"character {place}" in caught.value.what
    assert wanted in str(caught.value.wanted)
    assert "tokens <= 512" in caught.value.fix


def test_a_long_filter_is_refused() -> None:
    parse_filter("sample_id ~ " + "a" * (MAX_FILTER_LENGTH - 12))
    with pytest.raises(InvalidFilter, match="at most 1000"):
        parse_filter("sample_id ~ " + "a" * (MAX_FILTER_LENGTH - 11))


@given(st.text(max_size=60) | st.from_regex(r"(tokens|metadata\.a|sample_id) *(==|~|<) *.*"))
def test_any_text_is_a_filter_or_a_named_error(text: str) -> None:
    try:
        condition = parse_filter(text)
    except InvalidFilter:
        return
    mask = selection([condition])(_batch(['{"a": "x"}', '{"a": 1}', "{}"]))
    assert mask.shape == (3,)


@given(st.lists(SCALARS, min_size=1, max_size=6), SCALARS, st.sampled_from(sorted(OPERATORS)))
def test_comparisons_are_those_of_json(values: list[Any], wanted: Any, op: str) -> None:
    def kind(value: Any) -> type:
        return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)

    condition = Filter(("metadata", "a"), op, wanted)
    if op not in ("==", "!=") and kind(wanted) not in (float, str):
        return
    found = selection([condition])(_batch([json.dumps({"a": value}) for value in values])).tolist()
    expected = [OPERATORS[op](value, wanted) if kind(value) is kind(wanted) else op == "!=" for value in values]
    assert found == expected


@pytest.mark.parametrize("op", [*OPERATORS, "~"])
def test_rows_without_the_key_never_match(op: str) -> None:
    documents = [{}, {"a": {}}, {"a": 5}, {"a": [{"b": "5"}]}, {"a": {"c": "5"}}]
    assert _matches(f'metadata.a.b {op} "5"', documents) == [False] * 5


def test_a_pattern_is_found_in_texts_only() -> None:
    documents = [{"a": "xay"}, {"a": "b"}, {"a": 1}, {"a": None}, {"a": "\ud800a"}, {"a": ""}]
    assert _matches("metadata.a ~ a", documents) == [True, False, False, False, True, False]


def test_a_pattern_takes_linear_time() -> None:
    documents = [{"a": "a" * 100_000 + "b"}]
    assert _matches("metadata.a ~ ^(a+)+$", documents) == [False]


def test_sample_ids_are_compared_as_texts() -> None:
    documents: list[Any] = [{}, {}, {}]
    assert _matches("sample_id == 5", documents, ["5", "05", "6"]) == [True, False, False]
    assert _matches("sample_id < 5", documents, ["10", "5", "6"]) == [True, False, False]
    assert _matches("sample_id ~ ^.$", documents, ["10", "5", "Ü"]) == [False, True, True]


def test_tokens_and_targets_are_counted_from_plain_columns() -> None:
    assert _matches("tokens == 3", [{}, {}, {}]) == [False, True, False]
    assert _matches("targets >= 2", [{}, {}, {}]) == [False, True, True]


def test_no_filter_takes_every_row() -> None:
    np.testing.assert_array_equal(selection([])(_batch(["{}", "{}"])), [True, True])


@pytest.mark.parametrize("text", ["{", "", '{"a": 1e', "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_metadata_that_is_no_json_has_a_name(text: str) -> None:
    with pytest.raises(ShardDamaged, match="metadata of row 1"):
        selection([parse_filter("metadata.a == 1")])(_batch(["{}", text]))


@pytest.mark.parametrize("spans", [[0], [3, 1], [-2, 1], [1, 1]])
def test_spans_that_are_none_have_a_name(spans: list[int]) -> None:
    with pytest.raises(InvalidRow, match="target_spans"):
        selection([parse_filter("targets > 1")])(_batch(["{}"], spans=spans))


def test_ids_that_are_no_text_have_a_name() -> None:
    batch = _batch(["{}"])
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
    with pytest.raises(ColdstillError, match="UTF-8"):
        selection([parse_filter("sample_id == a")])(batch.set_column(0, SCHEMA.field("sample_id"), broken))
