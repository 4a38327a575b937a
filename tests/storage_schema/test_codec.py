"""Laws of the codec: what goes in comes out, to the precision of a half; what is damaged has a name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schema.codec import STREAMS, decode, encode
from storage_schema.errors import StreamDamaged
from storage_schema.header import DatasetHeader
from storage_schema.rows import LOG_TAIL_FLOOR, TeacherTargets
from tests import making

HALF = 2.0**-10  # relative step of a float16


@pytest.fixture(scope="module")
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder)


def _floored(targets: TeacherTargets, probs: np.ndarray, floor: float) -> TeacherTargets:
    """The same targets with ids below `floor` given back to the tail, and no draws."""
    counts = np.maximum(1, (np.exp(targets.logprobs) >= floor).sum(1)).astype(np.int32)
    kept = np.arange(targets.top_k) < counts[:, None]
    mass = np.where(kept, np.exp(targets.logprobs.astype(np.float64)), 0).sum(1)
    return replace(
        targets,
        counts=counts,
        ids=np.where(kept, targets.ids, targets.ids[:, :1]),
        logprobs=np.where(kept, targets.logprobs, -np.inf).astype(np.float32),
        log_tail=np.log(np.maximum(1 - mass, 1e-26)).astype(np.float32),
        draw_ids=np.empty(0, np.int32),
        draw_counts=np.zeros(len(probs), np.int32),
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.integers(1, 20),
    top_k=st.integers(1, making.VOCABULARY),
    draws=st.integers(0, 9),
    sharpness=st.floats(0.1, 8),
    floor=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_decoded_targets_are_the_encoded_ones(
    header: DatasetHeader, seed: int, positions: int, top_k: int, draws: int, sharpness: float, floor: float
) -> None:
    rng = np.random.default_rng(seed)
    header = header.model_copy(update={"top_k": top_k, "draws": draws})
    probs = making.random_probs(rng, positions, making.VOCABULARY, sharpness=sharpness)
    labels = rng.integers(0, making.VOCABULARY, positions).astype(np.int32)
    targets = making.targets_of(probs, labels, top_k=top_k, draws=draws, seed=seed)
    if floor:
        targets = _floored(targets, probs, floor)
    decoded = decode(encode(targets, labels=labels, header=header), labels=labels, header=header)
    decoded.check(token_count=making.VOCABULARY)
    for name in ("ids", "counts", "draw_ids", "draw_counts"):
        np.testing.assert_array_equal(getattr(decoded, name), getattr(targets, name))
    # Renormalising moves all values of a position by the halves' common error.
    for name in ("log_tail", "label_logprob"):
        np.testing.assert_allclose(getattr(decoded, name), getattr(targets, name), rtol=2 * HALF, atol=2 * HALF)
    kept = targets.kept
    np.testing.assert_allclose(decoded.logprobs[kept], targets.logprobs[kept], rtol=2 * HALF, atol=2 * HALF)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), top_k=st.integers(1, making.VOCABULARY))
def test_decoded_mass_is_one_tail_included(header: DatasetHeader, seed: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    header = header.model_copy(update={"top_k": top_k})
    probs = making.random_probs(rng, 10, making.VOCABULARY, sharpness=5)
    labels = np.zeros(10, np.int32)
    targets = making.targets_of(probs, labels, top_k=top_k)
    decoded = decode(encode(targets, labels=labels, header=header), labels=labels, header=header)
    mass = np.exp(decoded.logprobs, dtype=np.float64).sum(1) + np.exp(decoded.log_tail, dtype=np.float64)
    np.testing.assert_allclose(mass, 1, atol=1e-6)


def test_a_teacher_whose_kept_ids_hold_all_the_mass_stays_finite(header: DatasetHeader) -> None:
    probs = np.zeros((2, making.VOCABULARY))
    probs[:, 3] = 1.0
    with np.errstate(divide="ignore"):
        targets = making.targets_of(probs, np.array([3, 3], np.int32), top_k=1)
    header = header.model_copy(update={"top_k": 1})
    labels = np.array([3, 3], np.int32)
    decoded = decode(encode(targets, labels=labels, header=header), labels=labels, header=header)
    assert decoded.log_tail.tolist() == [LOG_TAIL_FLOOR, LOG_TAIL_FLOOR]
    assert decoded.logprobs.tolist() == [[0.0], [0.0]]


def test_label_logprob_is_stored_only_where_the_label_is_not_kept(header: DatasetHeader) -> None:
    rng = np.random.default_rng(3)
    probs = making.random_probs(rng, 6, making.VOCABULARY)
    best = probs.argmax(1).astype(np.int32)
    targets = making.targets_of(probs, best, top_k=8)
    assert encode(targets, labels=best, header=header)["label_logprob"] == b""


@pytest.fixture
def encoded(header: DatasetHeader) -> tuple[dict[str, bytes], np.ndarray]:
    rng = np.random.default_rng(4)
    probs = making.random_probs(rng, 12, making.VOCABULARY)
    labels = rng.integers(0, making.VOCABULARY, 12).astype(np.int32)
    targets = _floored(making.targets_of(probs, labels, top_k=8), probs, 0.02)
    drawn = making.targets_of(probs, labels, top_k=8, draws=4)
    first = replace(targets, draw_ids=drawn.draw_ids, draw_counts=drawn.draw_counts)
    return encode(first, labels=labels, header=header), labels


@pytest.mark.parametrize("name", STREAMS)
def test_a_missing_stream_has_a_name(
    header: DatasetHeader, encoded: tuple[dict[str, bytes], np.ndarray], name: str
) -> None:
    frames, labels = encoded
    with pytest.raises(StreamDamaged):
        decode({**frames, name: b""}, labels=labels, header=header)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("damage", ["cut", "flip", "trail", "not zstd", "two frames"])
def test_a_damaged_frame_has_a_name(
    header: DatasetHeader, encoded: tuple[dict[str, bytes], np.ndarray], name: str, damage: str
) -> None:
    frames, labels = encoded
    frame = frames[name]
    damaged = {
        "cut": frame[:-3],
        "flip": frame[:-1] + bytes([frame[-1] ^ 1]),
        "trail": frame + b"\0",
        "not zstd": b"gzip" + frame,
        "two frames": frame + frame,
    }[damage]
    with pytest.raises(StreamDamaged, match=name):
        decode({**frames, name: damaged}, labels=labels, header=header)


def test_a_frame_that_declares_more_than_the_counts_demand_is_never_opened(
    header: DatasetHeader, encoded: tuple[dict[str, bytes], np.ndarray]
) -> None:
    frames, labels = encoded
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(64 << 20))
    with pytest.raises(StreamDamaged, match="67108864 bytes declared"):
        decode({**frames, "ids": bomb}, labels=labels, header=header)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("counts", np.full(12, 9, "<u2")),
        ("counts", np.zeros(12, "<u2")),
        ("draw_counts", np.full(12, 5, "<u2")),
        ("log_tail", np.full(12, 1.0, "<f2")),
        ("log_tail", np.full(12, np.nan, "<f2")),
    ],
)
def test_values_outside_their_bounds_have_a_name(
    header: DatasetHeader, encoded: tuple[dict[str, bytes], np.ndarray], name: str, raw: np.ndarray
) -> None:
    frames, labels = encoded
    planes = np.ascontiguousarray(raw.view(np.uint8).reshape(-1, 2).T).tobytes()
    with pytest.raises(StreamDamaged, match=name):
        decode({**frames, name: zstandard.compress(planes)}, labels=labels, header=header)
