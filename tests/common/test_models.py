"""Laws of settings, records and their JSON files: strict, immutable, and bounded before they are parsed."""

from __future__ import annotations

import json
import time

import pytest
from pydantic import Field, ValidationError

from coldstill.common.errors import ColdstillError
from coldstill.common.models import MAX_DOCUMENT_BYTES, FrozenModel, parse_document


class Inner(FrozenModel):
    names: tuple[str, ...] = ()


class Record(FrozenModel):
    count: int = Field(ge=0)
    inner: Inner = Inner()


class RecordDamaged(ColdstillError):
    """A record that cannot be read."""


def parse(text: str | bytes) -> Record:
    data = text.encode() if isinstance(text, str) else text
    return parse_document(data, model=Record, where="record.json", error=RecordDamaged)


def test_a_model_cannot_be_changed_and_has_no_unknown_fields() -> None:
    record = Record(count=1)
    with pytest.raises(ValidationError):
        record.count = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Record(count=1, other=2)  # type: ignore[call-arg]


def test_a_document_is_read_back() -> None:
    record = Record(count=3, inner=Inner(names=("a", "b")))
    assert parse(record.model_dump_json()) == record


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"count": "1"}', "count"),
        ('{"count": 1.5}', "count"),
        ('{"count": -1}', "count"),
        ("{}", "count"),
        ('{"count": 1, "other": 2}', "other"),
        ('{"count": 1, "inner": {"names": ["a", 2]}}', "inner.names.1"),
        ("", "content"),
        ("[1]", "content"),
        ('{"count": 1', "content"),
        (b"\xff\xfe", "content"),
    ],
)
def test_the_first_wrong_field_is_named_in_the_caller_s_error(text: str | bytes, place: str) -> None:
    with pytest.raises(RecordDamaged) as caught:
        parse(text)
    assert caught.value.what == f"record.json: {place}"


@pytest.mark.parametrize(
    "data",
    [
        b" " * (MAX_DOCUMENT_BYTES + 1),
        b'{"count": 1, "inner": {"names": [' + b"[" * (1 << 20),
        b"[" + b"1," * (8 << 20) + b"1]",
    ],
)
def test_a_document_that_is_too_large_or_too_dense_is_rejected_before_it_is_parsed(data: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(RecordDamaged, match=r"record\.json: size"):
        parse(data)
    assert time.monotonic() - started < 10


def test_a_document_of_ten_thousand_records_is_not_too_dense() -> None:
    names = [f"shards/{number:06d}-0123456789ab.parquet" for number in range(100_000)]
    assert len(parse(json.dumps({"count": 1, "inner": {"names": names}})).inner.names) == 100_000
