"""The peer's codec: its two settings take the documented bytes, and its curve is the least-squares fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.codec.peer import Polynomial, recommended_polynomials
from tests.benchmarks.making import rows, through

VOCABULARY = 32_000


@pytest.mark.parametrize(("setting", "size"), [(0, 296), (1, 108)])
def test_the_peers_settings_take_its_bytes(setting: int, size: int) -> None:
    peer = recommended_polynomials(VOCABULARY)[setting]
    made = rows(top_k=peer.top_k)
    positions = sum(row.targets.positions for row in made)
    assert peer.raw_bytes == size
    assert sum(len(piece) for piece in peer.encode(made)) == size * positions


@pytest.mark.parametrize("setting", [0, 1])
def test_the_peer_keeps_ids_in_rank_order_and_its_exact_values_to_bfloat16(setting: int) -> None:
    peer = recommended_polynomials(VOCABULARY)[setting]
    for row, found in zip(made := rows(top_k=peer.top_k), through(peer, made), strict=True):
        np.testing.assert_array_equal(found.ids, row.targets.ids)
        exact = slice(0, peer.exact)
        np.testing.assert_allclose(found.logprobs[:, exact], row.targets.logprobs[:, exact], rtol=2**-8)


def test_the_peers_fit_is_the_least_squares_fit() -> None:
    peer = recommended_polynomials(VOCABULARY)[0]
    row = rows(top_k=peer.top_k, count=1)[0]
    ranks = np.arange(peer.top_k - peer.exact, dtype=np.float64)
    matrix = np.stack([ranks**0, ranks, ranks**2, ranks**3, ranks**4, np.sqrt(ranks)], 1)
    wanted = row.targets.logprobs[:, peer.exact :].astype(np.float64)
    fitted = matrix @ np.linalg.lstsq(matrix, wanted.T, rcond=None)[0]
    np.testing.assert_allclose(through(peer, [row])[0].logprobs[:, peer.exact :], fitted.T, atol=2e-3)


def test_a_curve_of_the_terms_round_trips() -> None:
    peer = Polynomial(top_k=20, exact=4, terms=(0, 1, "sqrt"), vocabulary=400)
    row = rows(top_k=20, count=1)[0]
    curve = np.concatenate([[-0.5, -1, -1.5, -2], -4 - 0.1 * np.arange(16) - 0.3 * np.sqrt(np.arange(16))])
    logprobs = np.broadcast_to(curve.astype(np.float32), row.targets.logprobs.shape)
    row.targets.logprobs[:] = logprobs
    np.testing.assert_allclose(through(peer, [row])[0].logprobs, logprobs, atol=1e-4)


def test_the_peers_tail_is_1_less_its_top_k() -> None:
    peer = recommended_polynomials(VOCABULARY)[0]
    found = through(peer, rows(top_k=peer.top_k))[0]
    left = 1 - np.exp(found.logprobs.astype(np.float64)).sum(1)
    assert (left > 0.01).all()
    np.testing.assert_allclose(np.exp(found.log_tail), left, rtol=1e-5)


def test_with_a_tail_the_peer_takes_two_more_bytes_and_decodes_it() -> None:
    peer = replace(recommended_polynomials(VOCABULARY)[0], tail=True)
    made = rows(top_k=peer.top_k)
    assert peer.raw_bytes == 298
    assert sum(len(piece) for piece in peer.encode(made)) == 298 * sum(row.targets.positions for row in made)
    for row, found in zip(made, through(peer, made), strict=True):
        np.testing.assert_array_equal(found.log_tail, row.targets.log_tail.astype(np.float16))


def test_a_top_k_with_mass_above_1_gives_the_peer_a_small_finite_tail() -> None:
    peer = recommended_polynomials(VOCABULARY)[1]
    row = rows(top_k=peer.top_k, count=1)[0]
    row.targets.logprobs[:] = -3.0
    found = through(peer, [row])[0]
    assert (np.exp(found.logprobs).sum(1) > 1).all()
    assert np.isfinite(found.log_tail).all()
    assert (np.exp(found.log_tail) < 1e-3).all()
