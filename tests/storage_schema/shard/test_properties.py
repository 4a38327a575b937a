"""Laws of shards and codec over everything that the format allows, found by hypothesis."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstill.storage_schema.codec import RowCodec
from coldstill.storage_schema.errors import InvalidRow, ShardTooLarge
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.rows import CachedRow, MediaReference, span_positions, spans_from_mask
from coldstill.storage_schema.shard import ShardFile, copy_shard, read_shard, write_shard
from tests import making

MAX_LENGTH = 64

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
CONTENT = st.binary(max_size=200)
MEDIA = st.dictionaries(
    st.integers(0, 1), st.tuples(st.sampled_from(["image/png", "audio/x-wav", "a/b.c+d"]), CONTENT, st.booleans())
)
MASKS = st.lists(st.booleans(), min_size=1, max_size=MAX_LENGTH - 1) | st.sampled_from(
    [[True], [True] * (MAX_LENGTH - 1), [True, False] * (MAX_LENGTH // 2 - 1) + [True]]
)


@pytest.fixture(scope="module")
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder, top_k=5, draws=3, max_length=MAX_LENGTH)


def _media(found: dict[int, tuple[str, bytes, bool]]) -> tuple[MediaReference, ...]:
    return tuple(
        MediaReference(
            position=position,
            type=kind,
            sha256=hashlib.sha256(content).hexdigest(),
            path=None if inline else f"media/{hashlib.sha256(content).hexdigest()}",
            data=content if inline else None,
        )
        for position, (kind, content, inline) in sorted(found.items())
    )


def _row(mask: list[bool], seed: int, sample_id: str = "a", metadata: object = None, media: object = None) -> CachedRow:
    """A row whose tokens from 1 on are targets where `mask` is true, and the last in any case."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, making.VOCABULARY, len(mask) + 1, dtype=np.int32)
    spans = spans_from_mask([False, *mask[:-1], True])
    positions = span_positions(spans)
    probs = making.random_probs(rng, positions.size, making.VOCABULARY, sharpness=3)
    targets = making.targets_of(probs, tokens[positions + 1], top_k=5, draws=3, seed=seed)
    return CachedRow(
        sample_id=sample_id,
        token_ids=tokens,
        target_spans=spans,
        targets=targets,
        metadata=metadata or {},  # type: ignore[arg-type]
        media=_media(media or {}),  # type: ignore[arg-type]
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(MASKS, st.integers(0, 2**32 - 1), TEXT, st.dictionaries(TEXT, JSON, max_size=4), MEDIA), max_size=5
    )
)
def test_any_row_reads_back_unchanged(
    header: DatasetHeader,
    rows: list[tuple[list[bool], int, str, dict[str, object], dict[int, tuple[str, bytes, bool]]]],
) -> None:
    written = [_row(*row) for row in rows]
    read = list(read_shard(write_shard(written, header=header), header=header, where="x"))
    assert len(read) == len(written)
    for mine, theirs in zip(written, read, strict=True):
        theirs.check(token_count=header.token_count, label_slack=0.2)
        assert (theirs.sample_id, theirs.metadata, theirs.media) == (mine.sample_id, mine.metadata, mine.media)
        np.testing.assert_array_equal(theirs.token_ids, mine.token_ids)
        np.testing.assert_array_equal(theirs.target_spans, mine.target_spans)
        np.testing.assert_array_equal(np.sort(theirs.targets.ids), np.sort(mine.targets.ids))
        np.testing.assert_array_equal(theirs.targets.draw_counts, mine.targets.draw_counts)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_any_k_over_any_vocabulary_comes_back(header: DatasetHeader, data: st.DataObject, seed: int) -> None:
    vocabulary = data.draw(st.integers(2, 1 << 20) | st.integers(2, 600), label="vocabulary")
    top_k = data.draw(st.integers(1, min(vocabulary, 4096)), label="top_k")
    ragged = data.draw(st.booleans(), label="ragged")
    ranked = data.draw(st.integers(0, min(vocabulary, 300)), label="ranked")
    rng = np.random.default_rng(seed)
    facts = {
        "top_k": top_k,
        "vocab_size": vocabulary,
        "token_count": vocabulary,
        "draws": 9,
        "kept_draws": 9,
        "codec": Codec.preset(data.draw(st.sampled_from(["fine", "coarse", "exact"])), top_k=top_k),
        "id_ranks": tuple(rng.choice(vocabulary, ranked, replace=False).tolist()),
    }
    codec = RowCodec(DatasetHeader.model_validate({**header.model_dump(), **facts}))
    positions = int(rng.integers(1, 4))
    counts = rng.integers(1, top_k + 1, positions) if ragged else np.full(positions, top_k)
    targets = making.wide_targets(rng, counts, vocabulary=vocabulary, top_k=top_k, most_draws=9)
    labels = rng.integers(0, vocabulary, positions).astype(np.int32)
    decoded = codec.decode(codec.encode(targets, labels=labels), labels=labels)
    decoded.check(token_count=vocabulary)
    np.testing.assert_array_equal(decoded.counts, counts)
    np.testing.assert_array_equal(decoded.draw_counts, targets.draw_counts)
    offsets = targets.draw_offsets
    for n, count in enumerate(counts):
        np.testing.assert_array_equal(np.sort(decoded.ids[n, :count]), np.sort(targets.ids[n, :count]))
        mine, theirs = (which.draw_ids[offsets[n] : offsets[n + 1]] for which in (targets, decoded))
        np.testing.assert_array_equal(np.sort(theirs), np.sort(mine))


@pytest.mark.parametrize("size", [1000, 2048, 4096, 4097, 9000, 500_000])
@pytest.mark.parametrize("letter", ["x", "é", "\x00", "\U0001f600"])
def test_a_long_sample_id_comes_back(header: DatasetHeader, size: int, letter: str) -> None:
    """Parquet's pages hold the least and the greatest of a page, up to a length."""
    names = [f"{number}{letter * (size // len(letter.encode()))}" for number in range(3)]
    data = write_shard([_row([True] * 5, 1, name) for name in names], header=header)
    assert [row.sample_id for row in read_shard(data, header=header, where="x")] == names


def test_more_row_groups_than_a_footer_may_have_are_not_written(header: DatasetHeader) -> None:
    data = write_shard([_row([True] * 5, 1)], header=header)
    batch = ShardFile(pa.BufferReader(data), size=len(data), codec=None, where="x").batch(0)
    assert len(list(read_shard(copy_shard([batch] * 2500, header=header), header=header, where="x"))) == 2500
    with pytest.raises(ShardTooLarge, match="footer"):
        copy_shard([batch] * 3500, header=header)


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": "\ud800"},
        {"\udfff": 1},
        {"a": 10**5000},
        {"a": object()},
        {"a": {1, 2}},
        {"a": b"bytes"},
        {1: 2, "a": 3},
    ],
    ids=["surrogate", "surrogate key", "long integer", "object", "set", "bytes", "mixed keys"],
)
def test_metadata_that_are_no_json_are_not_written(header: DatasetHeader, metadata: dict[str, object]) -> None:
    with pytest.raises(InvalidRow, match="metadata"):
        write_shard([_row([True] * 5, 1, metadata=metadata)], header=header)


def test_metadata_that_are_too_deep_are_not_written(header: DatasetHeader) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRow, match="metadata"):
        write_shard([_row([True] * 5, 1, metadata={"a": deep})], header=header)


def test_a_sample_id_that_is_no_text_is_not_written(header: DatasetHeader) -> None:
    with pytest.raises(InvalidRow, match="UTF-8"):
        write_shard([_row([True] * 5, 1, sample_id="\udc80")], header=header)


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=30),
    length=st.integers(2, 20),
    fidelity=st.sampled_from(["fine", "coarse", "exact"]),
)
def test_a_row_has_the_same_bits_alone_and_among_others(
    header: DatasetHeader, seeds: list[int], length: int, fidelity: str
) -> None:
    header = header.model_copy(update={"codec": Codec.preset(fidelity, top_k=5)})  # type: ignore[arg-type]
    data = write_shard([_row([True] * length, seed) for seed in seeds], header=header)
    file = ShardFile(pa.BufferReader(data), size=len(data), codec=None, where="x")
    for number, row in enumerate(file.rows()):
        alone = ShardFile(pa.BufferReader(data), size=len(data), codec=None, where="x").row(number)
        for name in ("ids", "logprobs", "log_tail", "label_logprob", "draw_ids"):
            np.testing.assert_array_equal(getattr(row.targets, name), getattr(alone.targets, name))
