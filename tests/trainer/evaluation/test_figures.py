"""The estimates from draws: their expectation over all outcomes is the dense value, whatever the cap; when they are
made at all."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.evaluation.figures import cache_figures, drawn_by_tail_mass, draws_per_position
from coldstill.trainer.targets import SparseTargets
from tests import making
from tests.trainer.evaluation import reference


def outcomes(p: np.ndarray, *, top_k: int, draws: int, cap: int) -> tuple[torch.Tensor, SparseTargets]:
    """A target position for each outcome of `draws` draws, of which `cap` at most were kept; and its probability."""
    kept = reference.ranked(p)[:top_k]
    found = list(reference.all_draws(p, draws))
    tails = [[v for v in drawn if v not in kept][:cap] for _, drawn in found]
    count = len(found)
    ids = torch.zeros(count, cap, dtype=torch.int64)
    weights = torch.zeros(count, cap, dtype=torch.float64)
    for n, tail in enumerate(tails):
        ids[n, : len(tail)] = torch.tensor(tail, dtype=torch.int64)
        weights[n, : len(tail)] = 1 / max(len(tail), 1)
    log_p = torch.from_numpy(np.log(p))
    targets = SparseTargets(
        ids=torch.tensor(kept).expand(count, -1),
        logprobs=log_p[kept].expand(count, -1),
        log_tail=torch.full((count,), math.log(sum(p[v] for v in range(p.size) if v not in kept)), dtype=torch.float64),
        labels=torch.zeros(count, dtype=torch.int64),
        label_logprob=log_p[:1].expand(count),
        draws=ids,
        draw_weights=weights,
        draw_logprobs=log_p[ids],
        row=torch.zeros(count, dtype=torch.int64),
        position=torch.arange(count),
    )
    return torch.tensor([weight for weight, _ in found], dtype=torch.float64), targets


@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(("top_k", "draws", "cap"), [(1, 4, 4), (2, 4, 2), (3, 3, 1), (4, 1, 1)])
def test_their_expectation_over_all_draws_is_the_dense_value(
    top_k: int, draws: int, cap: int, sharpness: float
) -> None:
    rng = np.random.default_rng(3)
    p = reference.softmax(sharpness * rng.standard_normal(6))
    student = rng.standard_normal(6)
    q = reference.softmax(student)
    weights, targets = outcomes(p, top_k=top_k, draws=draws, cap=cap)
    logits = torch.from_numpy(student).expand(targets.count, -1)
    figures = cache_figures(logits, targets, draws=draws)

    def mean(name: str) -> float:
        return float((weights * figures[name]).sum())

    assert mean("forward_kl_estimate") == pytest.approx(reference.kl(p, q), rel=1e-12)
    assert mean("soft_cross_entropy_estimate") == pytest.approx(reference.soft_cross_entropy(p, q), rel=1e-12)
    kept = reference.ranked(p)[:top_k]
    left_out = reference.kl(p, q) - reference.kl(reference.bucket(p, kept), reference.bucket(q, kept))
    assert mean("tail_kl_estimate") == pytest.approx(left_out, rel=1e-10)


def systematic_outcomes(p: np.ndarray, *, top_k: int, draws: int, cap: int) -> tuple[torch.Tensor, SparseTargets]:
    """Like `outcomes` of `draws` times the tail's mass systematic draws: each number, and each interval of shifts in
    which the draws are the same."""
    kept = reference.ranked(p)[:top_k]
    tail = [v for v in range(p.size) if v not in kept]
    sums = np.cumsum(p[tail])
    wanted = draws * sums[-1]
    found: list[tuple[float, list[int]]] = []
    for number, chance in ((math.floor(wanted), 1 - wanted % 1), (math.floor(wanted) + 1, wanted % 1)):
        number = min(number, cap)
        borders = sorted({0.0, 1.0, *((sums[:-1] / sums[-1] * number) % 1).tolist()})
        for low, high in pairwise(borders):
            points = [(place + (low + high) / 2) / max(number, 1) * sums[-1] for place in range(number)]
            drawn = [tail[int(np.searchsorted(sums, point, side="right"))] for point in points]
            found.append((chance * (high - low), drawn))
    most = max(len(drawn) for _, drawn in found)
    ids, weights = torch.zeros(len(found), most, dtype=torch.int64), torch.zeros(len(found), most, dtype=torch.float64)
    for n, (_, drawn) in enumerate(found):
        ids[n, : len(drawn)] = torch.tensor(drawn, dtype=torch.int64)
        weights[n, : len(drawn)] = 1 / max(len(drawn), 1)
    _, targets = outcomes(p, top_k=top_k, draws=1, cap=1)
    first = targets.part(0, 1)
    whole = {
        name: getattr(first, name).expand(len(found), *getattr(first, name).shape[1:])
        for name in ("ids", "logprobs", "log_tail", "labels", "label_logprob", "row", "position")
    }
    log_p = torch.from_numpy(np.log(p))
    targets = SparseTargets(**whole, draws=ids, draw_weights=weights, draw_logprobs=log_p[ids])
    return torch.tensor([chance for chance, _ in found], dtype=torch.float64), targets


@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(("top_k", "draws", "cap"), [(1, 4, 4), (2, 9, 2), (3, 3, 1), (4, 1, 1)])
def test_the_expectation_over_systematic_draws_is_the_dense_value(
    top_k: int, draws: int, cap: int, sharpness: float
) -> None:
    rng = np.random.default_rng(4)
    p, student = reference.softmax(sharpness * rng.standard_normal(6)), rng.standard_normal(6)
    q = reference.softmax(student)
    chances, targets = systematic_outcomes(p, top_k=top_k, draws=draws, cap=cap)
    assert float(chances.sum()) == pytest.approx(1)
    logits = torch.from_numpy(student).expand(targets.count, -1)
    figures = cache_figures(logits, targets, draws=draws, by_tail_mass=True)
    for name, wanted in (
        ("forward_kl_estimate", reference.kl(p, q)),
        ("soft_cross_entropy_estimate", reference.soft_cross_entropy(p, q)),
    ):
        assert float((chances * figures[name]).sum()) == pytest.approx(wanted, rel=1e-10)


def test_a_tail_of_almost_no_mass_gives_finite_estimates() -> None:
    p = np.array([1 - 3e-9, 1e-9, 2e-9])
    weights, targets = outcomes(p, top_k=1, draws=2, cap=2)
    logits = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64).expand(targets.count, -1)
    figures = cache_figures(logits, targets, draws=2)
    assert all(values.isfinite().all() for values in figures.values())
    q = reference.softmax(np.array([2.0, 0.0, 1.0]))
    assert float((weights * figures["forward_kl_estimate"]).sum()) == pytest.approx(reference.kl(p, q), rel=1e-12)


def test_padding_of_a_list_of_draws_has_no_effect() -> None:
    _, targets = outcomes(reference.softmax(np.arange(5.0)), top_k=2, draws=2, cap=2)
    logits = torch.arange(5, dtype=torch.float64).flip(0).expand(targets.count, -1)
    padded = replace(
        targets,
        draws=torch.nn.functional.pad(targets.draws, (0, 3)),
        draw_weights=torch.nn.functional.pad(targets.draw_weights, (0, 3)),
        draw_logprobs=torch.nn.functional.pad(targets.draw_logprobs, (0, 3), value=-torch.inf),
    )
    for name, values in cache_figures(logits, targets, draws=2).items():
        torch.testing.assert_close(cache_figures(logits, padded, draws=2)[name], values, rtol=0, atol=0)


def test_estimates_are_made_of_whole_datasets_with_one_number_of_draws(
    tiny_dataset: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    assert draws_per_position(load_logit_dataset(tiny_dataset)) == 4
    assert draws_per_position(load_logit_dataset(tiny_dataset, draws=2)) == 0
    assert draws_per_position(load_logit_dataset(tiny_dataset, top_k=4)) == 0
    rng = np.random.default_rng(0)
    blind, other = tmp_path / "blind", tmp_path / "other"
    for root, draws in ((blind, 0), (other, 2)):
        header = making.tiny_header(tokenizer_folder, draws=draws)
        rows = [making.random_row(rng, f"{root.name}-{n}", draws=draws) for n in range(3)]
        making.write_dataset(root, [rows], header=header, tokenizer=tokenizer_folder)
    assert draws_per_position(load_logit_dataset(blind)) == 0
    assert draws_per_position(load_logit_dataset([tiny_dataset, other])) == 0


@pytest.mark.parametrize(
    ("facts", "draws"),
    [
        ({"draw_method": "systematic", "draw_from": "tail", "draw_number": "by_tail_mass"}, 4),
        ({"draw_method": "systematic"}, 0),
        ({"draw_from": "tail"}, 0),
    ],
)
def test_estimates_are_made_of_the_draws_whose_number_is_known(
    facts: dict[str, str], draws: int, tiny_dataset: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    header = making.tiny_header(tokenizer_folder, draws=4).model_copy(update=facts)
    rows = [making.random_row(np.random.default_rng(0), f"row-{n}", draws=4) for n in range(3)]
    making.write_dataset(tmp_path / "other", [rows], header=header, tokenizer=tokenizer_folder)
    dataset = load_logit_dataset(tmp_path / "other")
    assert draws_per_position(dataset) == draws
    assert drawn_by_tail_mass(dataset) == (draws > 0)
    assert draws_per_position(load_logit_dataset([tiny_dataset, tmp_path / "other"])) == 0
