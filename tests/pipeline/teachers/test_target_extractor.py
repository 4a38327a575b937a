"""Laws of the target extractor: against plain float64 formulas written here, position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coldstill.pipeline.teachers.target_extractor import TargetExtractor, draw_uniforms, summarize, targets_of
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets


def _logits(positions: int, vocabulary: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def _no_draws(positions: int) -> np.ndarray:
    return np.empty((positions, 0))


@pytest.mark.parametrize("vocabulary", [7, 300, 5000])
@pytest.mark.parametrize("top_k", [1, 6])
@pytest.mark.parametrize("min_prob", [0.0, 0.05])
@pytest.mark.parametrize("padding", [0, 3])
def test_targets_are_those_of_plain_float64_formulas(
    vocabulary: int, top_k: int, min_prob: float, padding: int
) -> None:
    logits = _logits(9, vocabulary + padding)
    labels = torch.arange(9) % vocabulary
    targets = summarize(
        logits, labels, _no_draws(9), top_k=top_k, min_prob=min_prob, kept_draws=1024, token_count=vocabulary
    )
    targets.check(token_count=vocabulary)
    for n in range(9):
        z = logits[n, :vocabulary].double().numpy()
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        best = sorted(range(vocabulary), key=lambda v: (-p[v], v))[:top_k]
        kept = [v for rank, v in enumerate(best) if rank == 0 or p[v] >= min_prob]
        assert targets.ids[n, : targets.counts[n]].tolist() == kept
        np.testing.assert_allclose(targets.logprobs[n, : len(kept)], np.log(p[kept]), atol=2e-6)
        tail = sum(p[v] for v in range(vocabulary) if v not in kept)
        np.testing.assert_allclose(targets.log_tail[n], max(np.log(tail), LOG_FLOOR), atol=2e-6)
        np.testing.assert_allclose(targets.label_logprob[n], np.log(p[int(labels[n])]), atol=2e-6)


def test_the_tail_is_exact_where_one_minus_the_rest_is_noise() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 0] = 40.0
    targets = summarize(logits, torch.tensor([0]), _no_draws(1), top_k=1, min_prob=0, kept_draws=1024, token_count=100)
    np.testing.assert_allclose(targets.log_tail[0], np.log(99) - 40, atol=1e-5)


def test_k_equal_to_v_leaves_no_tail() -> None:
    targets = summarize(
        _logits(4, 8), torch.zeros(4).long(), np.zeros((4, 3)), top_k=8, min_prob=0, kept_draws=1024, token_count=8
    )
    assert (targets.log_tail == LOG_FLOOR).all()
    assert targets.draw_ids.size == 0


@pytest.mark.parametrize("vocabulary", [50, 5000])
def test_among_ties_any_ids_are_kept_and_the_rest_are_the_tail(vocabulary: int) -> None:
    targets = summarize(
        torch.zeros(2, vocabulary),
        torch.zeros(2).long(),
        np.full((2, 1), 0.999),
        top_k=5,
        min_prob=0,
        kept_draws=1024,
        token_count=vocabulary,
    )
    targets.check(token_count=vocabulary)
    np.testing.assert_allclose(targets.logprobs, -np.log(vocabulary), atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_told_by_position(bad: float) -> None:
    logits = _logits(5, 400)
    logits[3, 77] = bad
    extract = TargetExtractor(top_k=4, min_prob=1e-4, kept_draws=8, token_count=400)
    summary = extract(logits, torch.zeros(5).long(), torch.rand(5, 8).double())
    assert summary.finite.tolist() == [True, True, True, False, True]


def test_the_mass_of_padding_columns_is_recorded() -> None:
    logits = _logits(5, 400)
    extract = TargetExtractor(top_k=4, min_prob=0.0, kept_draws=0, token_count=390)
    summary = extract(logits, torch.zeros(5).long(), torch.empty(5, 0).double())
    wanted = torch.softmax(logits.double(), -1)[:, 390:].sum(-1)
    np.testing.assert_allclose(summary.padding_mass.numpy(), wanted.numpy(), rtol=1e-5)


def test_the_mass_of_padding_columns_is_recorded_however_far_they_are_above_all_tokens() -> None:
    logits = _logits(5, 400)
    logits[:, :390] -= 150  # the tokens of some models have logits of -100, and padding rows of zeros have 0
    extract = TargetExtractor(top_k=4, min_prob=0.0, kept_draws=0, token_count=390)
    summary = extract(logits, torch.zeros(5).long(), torch.empty(5, 0).double())
    np.testing.assert_allclose(summary.padding_mass.numpy(), 1, rtol=1e-6)


@pytest.mark.parametrize(("tokens", "top_k"), [(70, 16), (90, 60), (5000, 8), (5000, 70)])
@pytest.mark.parametrize("named", [False, True])
def test_where_fewer_than_k_tokens_have_any_mass_these_alone_are_kept(tokens: int, top_k: int, named: bool) -> None:
    """And the named ones, but no padding column, which has as little mass as a masked token."""
    logits = torch.full((2, tokens + 3), -torch.inf)
    logits[:, [3, 7, 11]] = torch.tensor([1.0, 0.5, 2.0])
    targets = summarize(
        logits,
        torch.tensor([3, 4]),
        np.random.default_rng(0).random((2, 4)),
        top_k=top_k,
        min_prob=0.0,
        kept_draws=4,
        token_count=tokens,
        named=np.array([[7, 20], [30, -1]]) if named else None,
        named_width=2 if named else 0,
    )
    targets.check(token_count=tokens)
    wanted = [[11, 3, 7, 20], [11, 3, 7, 30]] if named else [[11, 3, 7]] * 2
    assert [ids[:count].tolist() for ids, count in zip(targets.ids, targets.counts, strict=True)] == wanted
    assert targets.draw_ids.size == 0


@pytest.mark.parametrize("vocabulary", [70, 5000])
@pytest.mark.parametrize("min_prob", [0.0, 0.01])
def test_draws_are_those_of_a_plain_inverse_cdf(vocabulary: int, min_prob: float) -> None:
    """Kept mass first, then the tail in order of ids, summed in float64 one by one."""
    logits, uniforms = _logits(40, vocabulary, scale=2.0), np.random.default_rng(0).random((40, 24))
    targets = summarize(
        logits,
        torch.zeros(40).long(),
        uniforms,
        top_k=6,
        min_prob=min_prob,
        kept_draws=10,
        token_count=vocabulary,
        draw_logprobs=True,
    )
    targets.check(token_count=vocabulary)
    offsets, right, total = targets.draw_offsets, 0, 0
    assert targets.draw_logprobs is not None
    for n in range(40):
        p = torch.softmax(logits[n].double(), -1).numpy()
        kept = targets.ids[n, : targets.counts[n]]
        order = [*kept, *np.setdiff1d(np.arange(vocabulary), kept)]
        cumulative = np.cumsum(p[order])
        drawn = [order[int(np.searchsorted(cumulative, u, side="right"))] for u in uniforms[n]]
        wanted = [v for v in drawn if v not in kept][:10]
        found = targets.draw_ids[offsets[n] : offsets[n + 1]]
        assert len(found) == len(wanted)
        np.testing.assert_allclose(targets.draw_logprobs[offsets[n] : offsets[n + 1]], np.log(p[found]), atol=1e-5)
        right += int((found == wanted).sum())
        total += len(wanted)
    assert total > 100
    assert right >= total - 1  # a uniform may stand where rounding decides


def test_an_extractor_may_be_used_for_any_number_of_positions() -> None:
    """Its work memory grows, and what was in it does not matter."""
    extract = TargetExtractor(top_k=6, min_prob=1e-4, kept_draws=8, token_count=3000)
    for positions, seed in ((1, 0), (900, 1), (3, 2), (0, 3), (900, 4)):
        logits = _logits(positions, 3003, seed=seed)
        labels, uniforms = torch.arange(positions), np.random.default_rng(seed).random((positions, 8))
        ours = targets_of(extract(logits, labels, torch.from_numpy(uniforms)))
        alone = [
            summarize(
                logits[n : n + 1], labels[n : n + 1], uniforms[n : n + 1],
                top_k=6, min_prob=1e-4, kept_draws=8, token_count=3000,
            )
            for n in range(positions)
        ]  # fmt: skip
        for name in ("ids", "logprobs", "log_tail", "label_logprob", "draw_ids"):
            wanted = [getattr(one, name) for one in alone]
            assert np.array_equal(getattr(ours, name), np.concatenate(wanted)) if wanted else True


def test_low_precision_logits_give_whole_distributions() -> None:
    logits = _logits(16, 3000).bfloat16()
    targets = summarize(
        logits, torch.zeros(16).long(), _no_draws(16), top_k=32, min_prob=1e-4, kept_draws=1024, token_count=3000
    )
    mass = np.where(targets.kept, np.exp(targets.logprobs.astype(np.float64)), 0).sum(1) + np.exp(targets.log_tail)
    np.testing.assert_allclose(mass, 1, atol=1e-6)


def _drawn(logits: torch.Tensor, positions: np.ndarray, sample_id: str, **settings: float) -> TeacherTargets:
    uniforms = draw_uniforms(positions, draws=64, seed=11, sample_id=sample_id)
    options = {"top_k": 4, "min_prob": 0.0, "kept_draws": 64, "token_count": logits.shape[1], **settings}
    return summarize(logits, torch.zeros(len(positions)).long(), uniforms, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("min_prob", [0.0, 0.1])
def test_draws_follow_the_teacher(min_prob: float) -> None:
    """Chi-square of 200,000 draws over the tail and the kept mass as one cell; fixed seed, .1 % critical value."""
    vocabulary, repeats = 12, 200_000 // 64
    row = _logits(1, vocabulary, scale=1.0)
    targets = _drawn(row.expand(repeats, -1), np.arange(repeats), "a", min_prob=min_prob)
    p = torch.softmax(row[0].double(), -1).numpy()
    kept = targets.ids[0, : targets.counts[0]]
    tail = np.setdiff1d(np.arange(vocabulary), kept)
    observed = np.array([(targets.draw_ids == v).sum() for v in tail] + [64 * repeats - targets.draw_ids.size])
    expected = 64 * repeats * np.array([*p[tail], p[kept].sum()])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    critical = {8: 26.12, 9: 27.88, 10: 29.59, 11: 31.26}[len(tail)]
    assert statistic < critical


def test_draws_do_not_change_with_batching() -> None:
    logits, positions = _logits(10, 200, scale=1.0), np.array([0, 1, 2, 3, 7, 8, 20, 21, 22, 23])
    together = _drawn(logits, positions, "a")
    alone = [_drawn(logits[n : n + 1], positions[n : n + 1], "a") for n in range(10)]
    np.testing.assert_array_equal(together.draw_ids, np.concatenate([targets.draw_ids for targets in alone]))
    assert not np.array_equal(together.draw_ids, _drawn(logits, positions, "b").draw_ids)


@pytest.mark.parametrize("draws", [1, 4, 6, 64])
def test_uniforms_are_philox_at_counter_position(draws: int) -> None:
    """Written anew: one generator per position, its counter set by hand."""
    import hashlib

    positions = np.array([0, 1, 5, 900])
    uniforms = draw_uniforms(positions, draws=draws, seed=3, sample_id="ü")
    key = [3, int.from_bytes(hashlib.sha256("ü".encode()).digest()[:8], "little")]
    for row, position in zip(uniforms, positions, strict=True):
        counter = int(position) * ((draws + 3) // 4)
        words = np.random.Philox(counter=counter, key=np.array(key, np.uint64)).random_raw(draws)
        assert row.tolist() == [(int(word) >> 11) / 2**53 for word in words]
    assert draw_uniforms(np.empty(0, np.int64), draws=draws, seed=3, sample_id="ü").shape == (0, draws)


def test_of_more_draws_than_are_kept_the_first_stay() -> None:
    logits, positions = _logits(6, 30, scale=0.5), np.arange(6)
    all_of_them = _drawn(logits, positions, "a")
    some = _drawn(logits, positions, "a", kept_draws=5)
    offsets = all_of_them.draw_offsets
    assert some.draw_counts.tolist() == np.minimum(all_of_them.draw_counts, 5).tolist()
    first = [all_of_them.draw_ids[offsets[n] : offsets[n] + some.draw_counts[n]] for n in range(6)]
    np.testing.assert_array_equal(some.draw_ids, np.concatenate(first))
