"""Random numbers are a function of seed and place, equal in every release."""

from __future__ import annotations

import numpy as np
import pytest

from coldstill.trainer.data.rng import Purpose, mixture_uniforms, permutation, words, words_of_positions


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_a_permutation_has_every_number_once(size):
    order = permutation(size, seed=1, purpose=Purpose.ROWS, key=2, place=3)
    assert sorted(order.tolist()) == list(range(size))


def test_every_part_of_a_place_changes_the_words():
    place = {"seed": 1, "purpose": Purpose.ROWS, "key": 2, "first": 64, "place": 4}
    found = [words(8, **place)]
    for name in place:
        changed = {**place, name: Purpose.GROUPS if name == "purpose" else place[name] + 100}
        found.append(words(8, **changed))
    assert len(set(np.concatenate(found).tolist())) == 8 * len(found)


def test_the_order_of_a_run_does_not_change_with_a_release_of_ours_or_of_numpys():
    found = words(2, seed=7, purpose=Purpose.SHARDS, key=1, place=2)
    assert found.tolist() == [1919616196465665499, 12784999905616687494]
    assert permutation(8, seed=7, purpose=Purpose.ROWS, key=0, place=1).tolist() == [3, 5, 4, 0, 6, 7, 2, 1]


def test_words_of_a_position_do_not_depend_on_the_other_positions_of_a_call():
    every = words_of_positions(np.arange(20), 6, seed=3, key=9)
    some = np.array([4, 5, 11, 19])
    assert np.array_equal(words_of_positions(some, 6, seed=3, key=9), every[some])
    assert len(set(every.ravel().tolist())) == every.size


def test_uniforms_fill_the_unit_interval_and_blocks_do_not_overlap():
    values = np.concatenate([mixture_uniforms(block, seed=5) for block in range(20)])
    assert np.unique(values).size == values.size
    counts = np.histogram(values, bins=8, range=(0, 1))[0]
    assert abs(counts - values.size / 8).max() < 4 * np.sqrt(values.size / 8)
