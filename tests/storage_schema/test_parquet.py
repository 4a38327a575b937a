"""Laws of our reader of Parquet footers and pages: it agrees with Arrow, and damage is a `ValueError`."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstill.storage_schema.parquet import CODECS, FooterFacts, check_pages, read_footer
from coldstill.storage_schema.thrift import read_struct
from tests.fuzz.bases import make_bases
from tests.fuzz.parquet_parts import split
from tests.fuzz.thrift import I32, STRUCT, Field, Struct, write_struct


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    files = make_bases(tmp_path_factory.mktemp("bases"))[2].files
    return next(data for name, data in files.items() if name.startswith("shards/"))


@pytest.fixture(scope="module")
def footer(shard: bytes) -> bytes:
    return split(shard)[1]


def test_the_facts_are_those_that_arrow_reads(shard: bytes, footer: bytes) -> None:
    facts, metadata = read_footer(footer), pq.ParquetFile(io.BytesIO(shard)).metadata
    assert facts.rows == metadata.num_rows
    assert facts.key_values[b"coldstill"] == metadata.metadata[b"coldstill"]
    assert len(facts.groups) == metadata.num_row_groups
    for number, group in enumerate(facts.groups):
        theirs = metadata.row_group(number)
        assert (group.rows, len(group.chunks)) == (theirs.num_rows, theirs.num_columns)
        for column, chunk in enumerate(group.chunks):
            other = theirs.column(column)
            assert (chunk.path, CODECS[chunk.codec]) == (other.path_in_schema, other.compression)
            assert (chunk.values, chunk.raw) == (other.num_values, other.total_uncompressed_size)
            assert (chunk.place, chunk.stored) == (other.data_page_offset, other.total_compressed_size)
            assert chunk.other_pages == other.has_dictionary_page
            check_pages(memoryview(shard)[chunk.place : chunk.place + chunk.stored], chunk)


def _facts(footer: bytes) -> FooterFacts | None:
    try:
        return read_footer(footer)
    except ValueError:
        return None


def test_every_footer_that_is_cut_is_refused(footer: bytes) -> None:
    assert [length for length in range(len(footer)) if _facts(footer[:length])] == []
    assert _facts(footer + b"\0") is None


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_footer_with_another_byte_is_read_or_refused(footer: bytes, place: float, byte: int) -> None:
    at = int(place * len(footer))
    _facts(footer[:at] + bytes([byte]) + footer[at + 1 :])


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_struct_or_have_an_end(data: bytes) -> None:
    try:
        _, end = read_struct(data)
    except (IndexError, ValueError):
        return
    assert 0 < end <= len(data)


@pytest.mark.parametrize(
    "fields",
    [
        [Field(1, I32, 1), Field(1, I32, 2)],
        [Field(40_000, I32, 1)],
        [Field(65_540, I32, 1)],
        [Field(-3, I32, 1)],
    ],
    ids=["twice", "16 bits", "17 bits", "negative"],
)
def test_fields_that_arrow_would_see_in_another_way_are_refused(fields: list[Field]) -> None:
    with pytest.raises(ValueError, match="field"):
        read_struct(write_struct(Struct(fields)))


def test_values_that_are_too_deep_are_refused() -> None:
    inner = Struct()
    for _ in range(50):
        inner = Struct([Field(1, STRUCT, inner)])
    with pytest.raises(ValueError, match="deep"):
        read_struct(write_struct(inner))


def test_damage_to_the_pages_of_a_chunk_is_refused(shard: bytes, footer: bytes) -> None:
    for chunk in read_footer(footer).groups[0].chunks:
        data = shard[chunk.place : chunk.place + chunk.stored]
        for damaged in (data[:-1], data + data, b"", data[1:], data + b"\0"):
            with pytest.raises(ValueError):
                check_pages(memoryview(damaged), chunk)


def test_a_list_that_is_longer_than_its_data_takes_no_memory() -> None:
    with pytest.raises(IndexError):
        read_struct(bytes([0x19, 0xF5, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0]))
