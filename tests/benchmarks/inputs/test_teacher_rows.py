"""A narrowed wide row equals what the capture extracts with these limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.inputs.teacher_rows import DRAWS, KEPT_DRAWS, WIDEST, Limits, WideRow, all_draws, narrowed
from coldstill.pipeline.teachers.target_extractor import summarize

POSITIONS, VOCABULARY = 12, 600


def wide_row() -> tuple[WideRow, torch.Tensor, np.ndarray]:
    """A row of random logits with its labels and uniforms."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    tokens = torch.randint(0, VOCABULARY, (POSITIONS + 1,), generator=generator)
    uniforms = np.random.default_rng(0).random((POSITIONS, DRAWS))
    targets = kernel(logits, tokens, uniforms, Limits(top_k=WIDEST, draws=DRAWS), kept_draws=DRAWS)
    drawn = all_draws(targets, uniforms)
    row = WideRow(sample_id="a", token_ids=tokens.numpy().astype(np.int32), targets=targets, draws=drawn)
    return row, logits, uniforms


def kernel(logits: torch.Tensor, tokens: torch.Tensor, uniforms: np.ndarray, limits: Limits, *, kept_draws: int):
    """Straight from the logits."""
    return summarize(
        logits,
        tokens[1:],
        uniforms,
        top_k=limits.top_k,
        min_prob=limits.min_prob,
        kept_draws=kept_draws,
        token_count=VOCABULARY,
    )


@pytest.mark.parametrize("min_prob", [0.0, 1e-3])
@pytest.mark.parametrize("top_k", [1, 16, WIDEST])
def test_ids_log_probs_and_tail_are_those_of_the_capture(top_k: int, min_prob: float) -> None:
    row, logits, uniforms = wide_row()
    limits = Limits(top_k=top_k, min_prob=min_prob)
    tokens = torch.from_numpy(row.token_ids.astype(np.int64))
    wanted = kernel(logits, tokens, uniforms, limits, kept_draws=0)
    found = narrowed(row, limits)
    found.check(token_count=VOCABULARY)
    np.testing.assert_array_equal(found.targets.ids, wanted.ids)
    np.testing.assert_array_equal(found.targets.counts, wanted.counts)
    for name in ("logprobs", "log_tail", "label_logprob"):
        np.testing.assert_allclose(getattr(found.targets, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.labels, row.token_ids[1:])


def test_draws_are_those_outside_the_kept_ids_in_draw_order_up_to_the_limit() -> None:
    row, _, _ = wide_row()
    found = narrowed(row, Limits(top_k=2, min_prob=0.05, draws=DRAWS)).targets
    assert found.draw_counts.max() == KEPT_DRAWS
    for position in range(POSITIONS):
        kept = set(found.ids[position, : found.counts[position]].tolist())
        wanted = [draw for draw in row.draws[position].tolist() if draw not in kept][:KEPT_DRAWS]
        start, stop = found.draw_offsets[position : position + 2]
        assert found.draw_ids[start:stop].tolist() == wanted


def test_all_draws_follow_the_whole_distribution() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0, -1]]).repeat(400, 1)
    uniforms = np.random.default_rng(1).random((400, DRAWS))
    targets = summarize(
        logits, torch.zeros(400, dtype=torch.int64), uniforms, top_k=2, min_prob=0.0, kept_draws=DRAWS, token_count=5
    )
    share = np.bincount(all_draws(targets, uniforms).reshape(-1), minlength=5) / uniforms.size
    np.testing.assert_allclose(share, torch.softmax(logits[0], 0), atol=0.01)
