"""The codec's benchmark from end to end on a small random teacher: lines, headline and tables."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.codec.cases import NAIVE, TOP_KS, run
from benchmarks.codec.grid_study import study
from benchmarks.codec.sides import GuaranteeBroken, Measured
from benchmarks.codec.tables import figures, headline, print_tables
from benchmarks.inputs.small_language_model import VOCABULARY
from benchmarks.inputs.teacher_distributions import SHARPNESSES, Distributions
from benchmarks.inputs.teacher_rows import DRAWS, WIDEST, WideRow, all_draws
from coldstill.pipeline.teachers.target_extractor import summarize

POSITIONS = 40


def random_rows(count: int, *, scale: float, seed: int) -> list[WideRow]:
    """Rows of random teachers whose probabilities fall off as ranks do in text."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        ranks = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(POSITIONS)])
        logits = -scale * torch.log1p(ranks) + 0.5 * torch.randn(ranks.shape, generator=generator)
        tokens = torch.randint(0, VOCABULARY, (POSITIONS + 1,), generator=generator)
        uniforms = np.random.default_rng(row).random((POSITIONS, DRAWS))
        limits = {"top_k": WIDEST, "kept_draws": DRAWS, "token_count": VOCABULARY}
        targets = summarize(logits, tokens[1:], uniforms, min_prob=0.0, **limits)
        drawn, ids = all_draws(targets, uniforms), tokens.numpy().astype(np.int32)
        made.append(WideRow(sample_id=str(row), token_ids=ids, targets=targets, draws=drawn))
    return made


@pytest.fixture(scope="module")
def distributions() -> dict[str, Distributions]:
    return {
        name: Distributions(
            text="random",
            temperature=1.0,
            entropy=0.0,
            test=random_rows(2, scale=scale, seed=seed),
            calibration=random_rows(1, scale=scale, seed=seed + 10),
        )
        for seed, (name, scale) in enumerate(zip(SHARPNESSES, (2.5, 3.5), strict=True))
    }


@pytest.fixture(scope="module")
def lines(distributions: dict[str, Distributions]) -> list[Measured]:
    return run(distributions, every=1, rounds=1)


def test_every_k_has_ours_and_the_rivals_for_both_teachers(lines: list[Measured]) -> None:
    found = {(line["side"], line["teacher"], line["top_k"]) for line in map(figures, lines)}
    sides = ("ours, fine", "ours, fine, shard", "ours, coarse", "ours, exact", NAIVE, "bit-packed ids, float16")
    assert {(side, teacher, k) for side in sides for teacher in SHARPNESSES for k in TOP_KS} <= found
    peers = {(side, k) for side, _, k in found if side.startswith("polynomial") and "added" not in side}
    assert peers == {("polynomial, 16 exact", 128), ("polynomial, 1 exact", 50)}


def test_a_floor_and_no_draws_are_never_larger(lines: list[Measured]) -> None:
    sizes = {tuple(f.values())[:5]: f["bytes"] for f in map(figures, lines)}
    for (side, teacher, k, floor, draws), size in sizes.items():
        assert size <= sizes.get((side, teacher, k, floor, DRAWS), size)
        if floor and "shard" not in side:
            assert size <= sizes.get((side, teacher, k, 0.0, draws), size) + 1


def test_the_headline_is_json_with_the_figures_that_are_compared(lines: list[Measured]) -> None:
    found = json.loads(json.dumps(headline(lines)))
    assert found["bytes_ratio_to_peer"] == max(found["bytes_ratio_to_peer_by_teacher"].values())
    assert found["decode_over_naive"] == min(found["decode_over_naive_by_teacher"].values())
    assert set(found["bytes_default"]) == set(SHARPNESSES)
    assert found["decode_targets_per_s"] > 0


def test_a_higher_kl_than_the_peers_gives_no_ratio(lines: list[Measured]) -> None:
    peers = [line for line in lines if line.side.name.startswith("polynomial, 16")]
    kept = [line.kl.copy() for line in peers]
    for line in peers:
        line.kl[:] = 0
    with pytest.raises(GuaranteeBroken, match="K=128"):
        headline(lines)
    for line, kl in zip(peers, kept, strict=True):
        line.kl[:] = kl


def test_tables_name_all_sides(lines: list[Measured], distributions: dict[str, Distributions]) -> None:
    console = Console(file=io.StringIO(), width=180)
    print_tables(lines, console)
    study(distributions, every=1, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("ours, coarse, shard", "polynomial, 16 exact", "label_logprob", "identity", "cheapest"):
        assert word in text
