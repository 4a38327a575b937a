"""The bytes of a DistillKit capture decode to what a slow encoder, written from the formulas alone, encoded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.tools.exchange.distillkit_compression import (
    Legacy,
    Quantized,
    decode_legacy,
    decode_quantized,
    unpack_stream,
    unpack_words,
    within_mass,
)
from tests.tools.exchange import peers

BINS = [
    {"scale_dtype": "float32", "element_bits": 7, "num_elements": 20},
    {"scale_dtype": "float16", "element_bits": 1, "num_elements": 3},
    {"scale_dtype": "bfloat16", "element_bits": 33, "num_elements": 5},
]
SETTINGS = {
    "recommended": peers.ARCEE_128,
    "budget": peers.ARCEE_50,
    "exact": peers.ALL_EXACT,
    "readme": {**peers.ARCEE_128, "exact_k": 32, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2]},
    "residuals": {**peers.ARCEE_50, "residual_bins": BINS, "exact_dtype": "float64"},
    "only residuals": {**peers.ARCEE_50, "exact_k": 22, "polynomial_terms": None, "residual_bins": BINS},
    "steps": {**peers.ARCEE_50, "exact_dtype": "float16", "delta_encoding": True, "normalize_t": True},
    "nothing exact": {**peers.ARCEE_50, "exact_k": 0, "term_dtype": "float64"},
}


@given(st.integers(1, 64), st.lists(st.integers(0), min_size=1, max_size=20), st.integers(1, 3))
def test_packed_numbers_are_a_bit_stream_with_the_highest_bit_first(bits: int, drawn: list[int], rows: int) -> None:
    numbers = [number % 2**bits for number in drawn]
    packed = np.tile(np.frombuffer(peers.bit_stream(numbers, bits), np.uint8), (rows, 1))
    assert unpack_stream(packed, bits=bits, count=len(numbers)).tolist() == [numbers] * rows


@given(st.integers(1, 21), st.lists(st.integers(0), min_size=1, max_size=70))
def test_packed_words_never_split_a_number(bits: int, drawn: list[int]) -> None:
    numbers = [number % 2**bits for number in drawn]
    packed = np.array([peers.words(numbers, bits)], np.uint64)
    assert unpack_words(packed, bits=bits, count=len(numbers)).tolist() == [numbers]


@pytest.mark.parametrize("name", SETTINGS)
def test_values_decode_to_what_the_encoder_stored(name: str) -> None:
    settings = SETTINGS[name]
    config = Quantized.model_validate(settings)
    encoded = [peers.encode_position(peers.top(one, config.k)[1], settings) for one in peers.sequences(1)[0].logprobs]
    packed = np.array([list(data) for data, _ in encoded], np.uint8)
    assert packed.shape[1] == config.value_bytes
    np.testing.assert_allclose(decode_quantized(packed, config), [means for _, means in encoded], atol=1e-9)


@pytest.mark.parametrize(
    "changes", [{}, {"invert_polynomial": False, "polynomial_degree": 2, "with_sqrt_term": True}, {"exact_k": 0}]
)
def test_values_of_the_older_compressor_decode_to_what_it_stored(changes: dict[str, int]) -> None:
    settings = {**peers.LEGACY, **changes}
    config = Legacy.model_validate(settings)
    encoded = [peers.encode_legacy(peers.top(one, config.k)[1], settings) for one in peers.sequences(1)[0].logprobs]
    decoded = decode_legacy(np.array([one[0] for one in encoded]), np.array([one[1] for one in encoded]), config)
    np.testing.assert_allclose(decoded, [means for _, _, means in encoded], atol=1e-9)


def test_bits_of_an_id_are_those_that_float32_log2_gives_for_every_vocabulary() -> None:
    sizes = np.arange(2, (1 << 20) + 1)
    theirs = np.ceil(np.log2(sizes.astype(np.float32))).astype(int)
    for size in (
        *range(2, 200),
        *(1 << power for power in range(2, 21)),
        *((1 << power) + 1 for power in range(2, 20)),
    ):
        config = Quantized.model_validate({**peers.ALL_EXACT, "d": size})
        assert config.id_bits == theirs[size - 2]


def test_approximated_values_are_below_the_exact_ones_and_fit_beside_them() -> None:
    values = np.log(np.array([[0.7, 0.9, 0.2, 0.1], [0.5, 0.2, 0.1, 0.05]]))
    fitted = np.exp(within_mass(values, exact=1))
    np.testing.assert_allclose(fitted[0, 0], 0.7)
    np.testing.assert_allclose(fitted[0].sum(), 1, atol=2e-6)
    np.testing.assert_allclose(fitted[0, 1:] / fitted[0, 1], [1, 0.2 / 0.7, 0.1 / 0.7])
    np.testing.assert_allclose(fitted[1], np.exp(values[1]))
