"""Other codecs round-trip rows to the stored precision."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.codec.rivals import BitPacked, NaiveLists, Rival, pack_bits, unpack_bits
from tests.benchmarks.making import rows, through


@pytest.mark.parametrize(
    "rival",
    [NaiveLists(top_k=50), NaiveLists(top_k=50, byte_stream_split=True), BitPacked(top_k=50, vocabulary=400)],
    ids=lambda rival: rival.name,
)
def test_lists_and_packed_bits_round_trip_ids_and_halves(rival: Rival) -> None:
    made = rows(top_k=50)
    stored = through(rival, made)
    assert len(stored) == len(made)
    for row, found in zip(made, stored, strict=True):
        np.testing.assert_array_equal(found.ids, row.targets.ids)
        np.testing.assert_array_equal(found.logprobs, row.targets.logprobs.astype(np.float16))
        np.testing.assert_array_equal(found.log_tail, row.targets.log_tail.astype(np.float16))
        assert found.ids.dtype == np.int32
        assert found.logprobs.dtype == np.float32


@pytest.mark.parametrize("bits", [1, 7, 8, 15, 16, 17, 20])
def test_packed_bits_round_trip_in_the_fewest_bytes(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (3, 50), dtype=np.int32)
    packed = pack_bits(values, bits=bits)
    assert packed.shape == (3, -(-50 * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits=bits, count=50), values)
