"""Laws of the codec: a row decodes to its values, with the precision of the header; damage is a named error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstill.storage_schema.codec import STREAMS, RowCodec
from coldstill.storage_schema.errors import StreamDamaged
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets
from tests import making, reference

FIDELITIES = ("fine", "coarse", "exact")


@pytest.fixture(scope="module")
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder)


def _codec(header: DatasetHeader, *, fidelity: str = "fine", top_k: int, **changes: object) -> RowCodec:
    fields = {"top_k": top_k, "codec": Codec.preset(fidelity, top_k=top_k), **changes}  # type: ignore[arg-type]
    return RowCodec(DatasetHeader.model_validate({**header.model_dump(), **fields}))


def _step(codec: RowCodec, logprobs: np.ndarray) -> np.ndarray:
    """How far a stored value may be from the given one, from the formulas of FORMAT.md."""
    facts = codec.header.codec
    if facts.a is None or facts.b is None:
        return 2.0**-10 * (1 - logprobs)
    return 1 / (facts.a / 2 * np.exp(np.asarray(logprobs, np.float64) / 2) + facts.b)


def _sorted(targets: TeacherTargets) -> list[tuple[list[tuple[int, float]], list[int]]]:
    """Position by position: kept entries by id, and draws in ascending order."""
    offsets = targets.draw_offsets
    return [
        (
            sorted(zip(targets.ids[n, :count].tolist(), targets.logprobs[n, :count].tolist(), strict=True)),
            sorted(targets.draw_ids[offsets[n] : offsets[n + 1]].tolist()),
        )
        for n, count in enumerate(targets.counts)
    ]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.integers(0, 20),
    top_k=st.integers(1, making.VOCABULARY),
    draws=st.integers(0, 9),
    sharpness=st.floats(0.1, 60),
    floor=st.sampled_from([0.0, 0.01, 0.2]),
    fidelity=st.sampled_from(FIDELITIES),
    ranked=st.integers(0, making.VOCABULARY),
    with_logprobs=st.booleans(),
)
def test_decoded_targets_are_the_encoded_ones(
    header: DatasetHeader,
    seed: int,
    positions: int,
    top_k: int,
    draws: int,
    sharpness: float,
    floor: float,
    fidelity: str,
    ranked: int,
    with_logprobs: bool,
) -> None:
    rng = np.random.default_rng(seed)
    codec = _codec(
        header,
        fidelity=fidelity,
        top_k=top_k,
        draws=draws,
        kept_draws=draws,
        draw_logprobs=with_logprobs,
        id_ranks=tuple(rng.permutation(making.VOCABULARY)[:ranked].tolist()),
    )
    probs = making.random_probs(rng, positions, making.VOCABULARY, sharpness=sharpness)
    labels = rng.integers(0, making.VOCABULARY, positions).astype(np.int32)
    targets = making.targets_of(
        probs, labels, top_k=top_k, min_prob=floor, draws=draws, seed=seed, draw_logprobs=with_logprobs
    )
    decoded = codec.decode(codec.encode(targets, labels=labels), labels=labels)
    decoded.check(token_count=making.VOCABULARY)
    np.testing.assert_array_equal(decoded.counts, targets.counts)
    np.testing.assert_array_equal(decoded.draw_counts, targets.draw_counts)
    for (mine, my_draws), (theirs, their_draws) in zip(_sorted(targets), _sorted(decoded), strict=True):
        assert [entry[0] for entry in mine] == [entry[0] for entry in theirs]
        assert my_draws == their_draws
        wanted = np.maximum([entry[1] for entry in mine], LOG_FLOOR)
        # Steps grow towards small probabilities: half of the longest that the value can lie in. Renormalizing moves all
        # values of a position by less than the step of its most probable entry.
        slack = _step(codec, wanted - 0.5) / 2 + _step(codec, np.zeros(1)) + 1e-4
        assert (np.abs(np.array([entry[1] for entry in theirs]) - wanted) <= slack).all()
    for name in ("log_tail", "label_logprob"):
        wanted = np.maximum(getattr(targets, name), LOG_FLOOR)
        assert (np.abs(getattr(decoded, name) - wanted) <= _step(codec, wanted) + 2e-3 * (1 - wanted)).all()
    if with_logprobs and draws and positions:
        assert decoded.draw_logprobs is not None
        owner = np.repeat(np.arange(positions), decoded.draw_counts)
        wanted = np.maximum(np.log(probs[owner, decoded.draw_ids]), LOG_FLOOR)
        np.testing.assert_allclose(decoded.draw_logprobs, wanted, rtol=2e-3, atol=2e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([4096, 65_536, 65_537, 1 << 20]),
    top_k=st.sampled_from([1, 64, 255, 256, 1701, 4096]),
    positions=st.integers(1, 3),
    fidelity=st.sampled_from(FIDELITIES),
    ragged=st.booleans(),
)
def test_every_size_that_the_format_allows_comes_back(
    header: DatasetHeader, seed: int, vocabulary: int, top_k: int, positions: int, fidelity: str, ragged: bool
) -> None:
    rng = np.random.default_rng(seed)
    codec = _codec(
        header, fidelity=fidelity, top_k=top_k, vocab_size=vocabulary, token_count=vocabulary, draws=300, kept_draws=300
    )
    counts = rng.integers(1, top_k + 1, positions) if ragged else np.full(positions, top_k)
    targets = making.wide_targets(rng, counts, vocabulary=vocabulary, top_k=top_k, most_draws=300)
    labels = rng.integers(0, vocabulary, positions).astype(np.int32)
    decoded = codec.decode(codec.encode(targets, labels=labels), labels=labels)
    decoded.check(token_count=vocabulary)
    for (mine, my_draws), (theirs, their_draws) in zip(_sorted(targets), _sorted(decoded), strict=True):
        assert ([entry[0] for entry in mine], my_draws) == ([entry[0] for entry in theirs], their_draws)
    kl = reference.storage_kl(targets, decoded)
    assert max(kl) < 10 * codec.header.codec.mean_kl


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_decoded_mass_is_one_tail_included(header: DatasetHeader, fidelity: str) -> None:
    rng = np.random.default_rng(5)
    codec = _codec(header, fidelity=fidelity, top_k=20)
    probs = making.random_probs(rng, 200, making.VOCABULARY, sharpness=5)
    labels = np.zeros(200, np.int32)
    targets = making.targets_of(probs, labels, top_k=20)
    decoded = codec.decode(codec.encode(targets, labels=labels), labels=labels)
    mass = np.exp(decoded.logprobs, dtype=np.float64).sum(1) + np.exp(decoded.log_tail, dtype=np.float64)
    np.testing.assert_allclose(mass, 1, atol=1e-6)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_teacher_whose_kept_ids_hold_all_the_mass_stays_finite(header: DatasetHeader, fidelity: str) -> None:
    probs = np.zeros((2, making.VOCABULARY))
    probs[:, 3] = 1.0
    labels = np.array([3, 4], np.int32)
    with np.errstate(divide="ignore"):
        targets = making.targets_of(probs, labels, top_k=2)
    codec = _codec(header, fidelity=fidelity, top_k=2)
    assert np.isneginf(targets.logprobs).any()
    decoded = codec.decode(codec.encode(targets, labels=labels), labels=labels)
    np.testing.assert_allclose(decoded.log_tail, LOG_FLOOR, atol=0.02)
    np.testing.assert_allclose(decoded.by_probability().logprobs, [[0.0, LOG_FLOOR]] * 2, atol=0.02)
    assert np.isfinite(decoded.label_logprob).all()


def test_equally_probable_ids_keep_equal_log_probs(header: DatasetHeader) -> None:
    probs = np.full((3, making.VOCABULARY), 1 / making.VOCABULARY)
    labels = np.array([0, 40, 63], np.int32)
    for fidelity in FIDELITIES:
        codec = _codec(header, fidelity=fidelity, top_k=16)
        decoded = codec.decode(codec.encode(making.targets_of(probs, labels, top_k=16), labels=labels), labels=labels)
        assert np.unique(decoded.logprobs).size == 1


def test_the_exact_codec_keeps_the_order_of_ranks(header: DatasetHeader) -> None:
    rng = np.random.default_rng(8)
    probs = making.random_probs(rng, 9, making.VOCABULARY)
    labels = np.zeros(9, np.int32)
    targets = making.targets_of(probs, labels, top_k=30)
    codec = _codec(header, fidelity="exact", top_k=30)
    np.testing.assert_array_equal(codec.decode(codec.encode(targets, labels=labels), labels=labels).ids, targets.ids)


def test_decoding_fills_the_arrays_that_the_caller_passes(header: DatasetHeader) -> None:
    rng = np.random.default_rng(9)
    codec = _codec(header, top_k=8)
    probs = making.random_probs(rng, 5, making.VOCABULARY)
    labels = rng.integers(0, making.VOCABULARY, 5).astype(np.int32)
    frames = codec.encode(making.targets_of(probs, labels, top_k=8), labels=labels)
    batch = TeacherTargets.empty(12, 8)
    batch.ids.fill(-7)
    filled = codec.decode(frames, labels=labels, out=batch.slice(4, 9))
    alone = codec.decode(frames, labels=labels)
    assert filled.ids.base is batch.ids
    for name in ("ids", "logprobs", "counts", "log_tail", "label_logprob"):
        np.testing.assert_array_equal(getattr(batch, name)[4:9], getattr(alone, name))
    assert (batch.ids[:4] == -7).all()
    assert (batch.ids[9:] == -7).all()


def test_label_logprob_is_stored_only_where_the_label_is_not_kept(header: DatasetHeader) -> None:
    rng = np.random.default_rng(3)
    probs = making.random_probs(rng, 6, making.VOCABULARY)
    best = probs.argmax(1).astype(np.int32)
    targets = making.targets_of(probs, best, top_k=8)
    assert _codec(header, top_k=8).encode(targets, labels=best)["label_logprob"] == b""


class Encoded:
    """A row with every stream that its codec has in use, where there is one."""

    def __init__(self, header: DatasetHeader, fidelity: str):
        rng = np.random.default_rng(4)
        self.codec = _codec(
            header,
            fidelity=fidelity,
            top_k=8,
            vocab_size=4096,
            token_count=4096,
            draws=300,
            kept_draws=300,
            draw_logprobs=True,
        )
        self.labels = rng.integers(0, 4096, 12).astype(np.int32)
        counts = np.array([8, 1, 3, 8, 2, 5, 8, 8, 7, 1, 2, 8])
        targets = making.wide_targets(rng, counts, vocabulary=4096, top_k=8, most_draws=20, sharpness=9)
        draw_logprobs = np.full(targets.draw_ids.size, -9, np.float32)
        self.frames = self.codec.encode(replace(targets, draw_logprobs=draw_logprobs), labels=self.labels)

    def decode(self, **changed: bytes) -> TeacherTargets:
        return self.codec.decode({**self.frames, **changed}, labels=self.labels)


@pytest.fixture(params=["fine", "exact"])
def encoded(header: DatasetHeader, request: pytest.FixtureRequest) -> Encoded:
    return Encoded(header, request.param)


def test_the_damage_below_is_done_to_every_stream(header: DatasetHeader) -> None:
    assert {name for name, frame in Encoded(header, "fine").frames.items() if frame} == set(STREAMS)


@pytest.mark.parametrize("name", STREAMS)
def test_a_missing_stream_has_a_name(encoded: Encoded, name: str) -> None:
    if encoded.frames[name]:
        with pytest.raises(StreamDamaged):
            encoded.decode(**{name: b""})


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_the_row_does_not_use_is_refused(encoded: Encoded, name: str) -> None:
    if not encoded.frames[name]:
        with pytest.raises(StreamDamaged, match=name):
            encoded.decode(**{name: zstandard.compress(b"a")})


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("damage", ["cut", "flip", "trail", "not zstd", "two frames", "empty frame"])
def test_a_damaged_frame_has_a_name(encoded: Encoded, name: str, damage: str) -> None:
    frame = encoded.frames[name]
    damaged = {
        "cut": frame[:-3] or b"(",
        "flip": frame[:-1] + bytes([frame[-1] ^ 1 if frame else 1]),
        "trail": frame + b"\0",
        "not zstd": b"gzip" + frame,
        "two frames": frame + (frame or zstandard.compress(b"")),
        "empty frame": zstandard.compress(b""),
    }[damage]
    with pytest.raises(StreamDamaged, match=name):
        encoded.decode(**{name: damaged})


@pytest.mark.parametrize("name", STREAMS)
def test_a_frame_that_declares_more_than_the_counts_demand_is_never_opened(encoded: Encoded, name: str) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(64 << 20))
    with pytest.raises(StreamDamaged, match=r"67108864 bytes declared|nothing: this row"):
        encoded.decode(**{name: bomb})


@pytest.mark.parametrize(
    ("fidelity", "name", "raw"),
    [
        ("fine", "counts", np.full(12, 9, "<u1")),
        ("fine", "counts", np.zeros(12, "<u1")),
        ("fine", "draw_counts", np.full(12, 301, "<u2")),
        ("fine", "last_levels", np.full(12, 60_000, "<u2")),
        ("fine", "log_tail", np.full(12, 60_000, "<u2")),
        ("fine", "last_levels", np.zeros(12, "<u2")),
        ("exact", "log_tail", np.full(12, 1.0, "<f2")),
        ("exact", "log_tail", np.full(12, np.nan, "<f2")),
        ("exact", "log_tail", np.full(12, -np.inf, "<f2")),
    ],
)
def test_values_outside_their_bounds_have_a_name(
    header: DatasetHeader, fidelity: str, name: str, raw: np.ndarray
) -> None:
    planes = np.ascontiguousarray(raw.view(np.uint8).reshape(12, -1).T).tobytes()
    with pytest.raises(StreamDamaged, match="stream"):
        Encoded(header, fidelity).decode(**{name: zstandard.compress(planes)})


@pytest.mark.parametrize("fidelity", ["fine", "exact"])
def test_an_id_at_or_above_token_count_has_a_name(header: DatasetHeader, fidelity: str) -> None:
    """A shard whose header is changed to a smaller vocabulary."""
    encoded = Encoded(header, fidelity)
    smaller = _codec(encoded.codec.header, fidelity=fidelity, top_k=8, token_count=60, vocab_size=60)
    with pytest.raises(StreamDamaged, match="ids"):
        smaller.decode(encoded.frames, labels=encoded.labels)


def test_an_id_twice_at_one_position_has_a_name(header: DatasetHeader) -> None:
    codec = _codec(header, fidelity="exact", top_k=2)
    labels = np.zeros(1, np.int32)
    targets = making.targets_of(np.full((1, making.VOCABULARY), 1 / making.VOCABULARY), labels, top_k=2)
    frames = codec.encode(targets, labels=labels)
    with pytest.raises(StreamDamaged, match="distinct"):
        codec.decode({**frames, "ids": zstandard.compress(bytes([5, 5, 0, 0]))}, labels=labels)


def test_a_row_of_too_many_entries_is_refused_before_anything_is_opened(header: DatasetHeader) -> None:
    codec = _codec(header, top_k=64)
    with pytest.raises(StreamDamaged, match="at most 16777216"):
        codec.decode(dict.fromkeys(STREAMS, b""), labels=np.zeros((1 << 18) + 1, np.int32))


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_rows_decoded_together_are_those_decoded_alone(header: DatasetHeader, fidelity: str) -> None:
    """Ragged and full ones, with and without draws, single positions and none at all; each in memory of its own."""
    rng = np.random.default_rng(12)
    codec = _codec(header, fidelity=fidelity, top_k=8, draws=6, kept_draws=6, draw_logprobs=True)
    rows, labels = [], []
    for positions, floor, draws in ((5, 0.0, 0), (1, 0.05, 6), (0, 0.0, 6), (9, 0.05, 0), (4, 0.0, 6)):
        probs = making.random_probs(rng, positions, making.VOCABULARY)
        labels.append(rng.integers(0, making.VOCABULARY, positions).astype(np.int32))
        targets = making.targets_of(
            probs, labels[-1], top_k=8, min_prob=floor, draws=draws, seed=positions, draw_logprobs=True
        )
        rows.append(codec.encode(targets, labels=labels[-1]))
    together = codec.decode_rows(rows, labels=labels)
    for row, row_labels, found in zip(rows, labels, together, strict=True):
        alone = codec.decode(row, labels=row_labels)
        for name in ("ids", "logprobs", "counts", "log_tail", "label_logprob", "draw_ids", "draw_counts"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-6)
            assert getattr(found, name).base is None
        np.testing.assert_array_equal(found.draw_logprobs, alone.draw_logprobs)


def test_threads_decode_at_the_same_time(header: DatasetHeader) -> None:
    rng = np.random.default_rng(13)
    codec = _codec(header, top_k=8)
    encoded = []
    for seed in range(8):
        probs = making.random_probs(rng, 300, making.VOCABULARY)
        labels = rng.integers(0, making.VOCABULARY, 300).astype(np.int32)
        targets = making.targets_of(probs, labels, top_k=8, seed=seed)
        encoded.append((codec.encode(targets, labels=labels), labels))
    alone = [codec.decode(frames, labels=labels).logprobs for frames, labels in encoded]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            futures = [pool.submit(codec.decode, frames, labels=labels) for frames, labels in encoded]
            for future, wanted in zip(futures, alone, strict=True):
                np.testing.assert_array_equal(future.result().logprobs, wanted)
