"""Laws of sampling: which tokens can be chosen, how often, and that an answer's numbers are its own."""

from __future__ import annotations

import numpy as np
import pytest

from coldstill.pipeline.teachers.sampling import answer_seed, answer_uniforms, next_token, top_p_set
from coldstill.pipeline.teachers.uniforms import draw_uniforms
from tests import making


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.75, 0.999])
def test_the_top_p_set_is_the_smallest_of_that_mass(top_p: float) -> None:
    for probs in making.random_probs(np.random.default_rng(0), 20, 30):
        wanted: list[int] = []
        for id_ in sorted(range(30), key=lambda v: (-probs[v], v)):
            if sum(probs[v] for v in wanted) >= top_p:
                break
            wanted.append(id_)
        assert top_p_set(probs, top_p).tolist() == wanted


def test_of_equals_the_top_p_set_takes_the_lowest_ids() -> None:
    assert top_p_set(np.full(8, 0.125), 0.3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("uniform", [0.0, 0.4, 1 - 2**-53])
def test_temperature_0_takes_the_most_probable_token_whatever_the_number(uniform: float) -> None:
    logits = np.array([0.5, 2.0, 2.0, -1.0], np.float32)
    assert next_token(logits, temperature=0, top_p=0.5, uniform=uniform) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
def test_tokens_are_as_frequent_as_the_tempered_and_cut_softmax(temperature: float, top_p: float) -> None:
    """Chi-square of 50,000 tokens, fixed seed, .1 % critical values."""
    count = 50_000
    logits = np.random.default_rng(3).standard_normal(10).astype(np.float32)
    probs = np.exp(logits.astype(np.float64) / temperature)
    probs /= probs.sum()
    allowed = top_p_set(probs, top_p) if top_p < 1 else np.arange(10)
    uniforms = answer_uniforms(seed=5, sample_id="a", number=0, count=count)
    tokens = [next_token(logits, temperature=temperature, top_p=top_p, uniform=u) for u in uniforms]
    observed = np.bincount(tokens, minlength=10)
    assert observed.sum() == observed[allowed].sum()
    expected = count * probs[allowed] / probs[allowed].sum()
    statistic = float(((observed[allowed] - expected) ** 2 / expected).sum())
    critical = {4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88}[len(allowed) - 1]
    assert statistic < critical


@pytest.mark.parametrize("top_p", [0.9999, 1.0])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_mass_is_never_chosen(uniform: float, top_p: float) -> None:
    logits = np.array([-np.inf, 0.0, 1.0, -np.inf])
    assert next_token(logits, temperature=1, top_p=top_p, uniform=uniform) in (1, 2)


def test_the_numbers_of_an_answer_do_not_depend_on_how_many_are_asked_for() -> None:
    few = answer_uniforms(seed=1, sample_id="a", number=2, count=3)
    many = answer_uniforms(seed=1, sample_id="a", number=2, count=100)
    np.testing.assert_array_equal(few, many[:3])
    assert ((many >= 0) & (many < 1)).all()


def test_each_answer_has_numbers_of_its_own() -> None:
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    firsts = {float(answer_uniforms(seed=s, sample_id=i, number=n, count=1)[0]) for s, i, n in keys}
    firsts.add(float(draw_uniforms(np.array([0]), draws=1, seed=0, sample_id="a")[0, 0]))
    assert len(firsts) == len(keys) + 1
    seeds = {answer_seed(seed=s, sample_id=i, number=n) for s, i, n in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
