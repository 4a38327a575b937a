"""Laws of uniforms made from random words."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coldstill.common.rng import WORDS_PER_COUNT, to_uniforms

WORDS = st.integers(0, 2**64 - 1)


@given(st.lists(WORDS, min_size=1))
def test_uniforms_are_the_high_53_bits_and_below_one(words: list[int]) -> None:
    uniforms = to_uniforms(np.array(words, np.uint64))
    assert uniforms.dtype == np.float64
    assert [int(uniform * 2**53) for uniform in uniforms] == [word >> 11 for word in words]
    assert uniforms.min() >= 0
    assert uniforms.max() < 1


def test_the_shape_stays_and_the_ends_are_exact() -> None:
    words = np.array([[0, 1], [2**11, 2**64 - 1]], np.uint64)
    assert to_uniforms(words).tolist() == [[0.0, 0.0], [2.0**-53, 1 - 2.0**-53]]


@given(WORDS, st.integers(1, 50))
def test_they_are_the_uniforms_of_numpy_s_own_generator(key: int, count: int) -> None:
    words = np.random.Philox(key=key).random_raw(count)
    assert to_uniforms(words).tolist() == np.random.Generator(np.random.Philox(key=key)).random(count).tolist()


@given(WORDS, st.integers(0, 1000))
def test_a_counter_value_is_a_fixed_number_of_words(key: int, counter: int) -> None:
    from_start = np.random.Philox(key=key).random_raw(WORDS_PER_COUNT * (counter + 1))
    # numpy increments the counter before it makes words, so the first block of a counter is the one after it.
    at_place = np.random.Philox(key=key, counter=counter).random_raw(WORDS_PER_COUNT)
    assert at_place.tolist() == from_start[-WORDS_PER_COUNT:].tolist()
