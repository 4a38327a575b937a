"""Laws of the tap's own parts, without vLLM: a table of hidden states for a model, a matrix for a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from coldstill.pipeline.teachers.target_extractor import draw_uniforms, summarize
from coldstill.pipeline.teachers.vllm.scoring import Arrays, Piece, RequestSpec, StepScorer, TappedRequest, TapSettings
from coldstill.storage_schema.rows import TeacherTargets

V, WIDTH = 500, 16
SETTINGS = TapSettings(top_k=6, min_prob=1e-4, draws=8, kept_draws=5, draw_logprobs=True, draw_seed=3, token_count=490)
HEAD = torch.randn(WIDTH, V, generator=torch.Generator().manual_seed(0))


def _prompt(length: int, *, seed: int = 0) -> tuple[list[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 490, (length,), generator=generator).tolist(), torch.randn(
        length, WIDTH, generator=generator
    )


def _request(prompt: Sequence[int], spans: list[list[int]], sample_id: str = "a") -> TappedRequest:
    spec: RequestSpec = {"number": 0, "sample_id": sample_id, "spans": spans}
    return TappedRequest(spec, prompt=prompt, settings=SETTINGS)


def _scorer(**changes: Any) -> StepScorer:
    return StepScorer(
        SETTINGS, **{"vocab_size": V, "block_bytes": 20 * 8 * V, "keeps": True, "is_split": False, **changes}
    )


def _piece(request: TappedRequest, first: int, stop: int, offset: int = 0) -> Piece:
    """The part of a prompt that a step computes, whose hidden states begin at row `offset`."""
    part = request.wanted(first, stop)
    return Piece(request, part, request.positions[part] - first + offset, request.labels(part))


def _expected(prompt: Sequence[int], hidden: torch.Tensor, positions: np.ndarray, sample_id: str) -> TeacherTargets:
    return summarize(
        hidden[positions] @ HEAD,
        torch.tensor(prompt)[positions + 1],
        draw_uniforms(positions, draws=8, seed=3, sample_id=sample_id),
        top_k=6,
        min_prob=1e-4,
        kept_draws=5,
        token_count=490,
        draw_logprobs=True,
    )


def _taken(request: TappedRequest) -> TeacherTargets:
    count = request.positions.size
    assert request.problem(count) == ""
    wire = request.arrays.to_wire(count)
    return Arrays.from_wire(wire, positions=count, settings=SETTINGS).targets(draw_logprobs=True)


def _assert_same(ours: TeacherTargets, wanted: TeacherTargets) -> None:
    np.testing.assert_array_equal(ours.by_probability().ids, wanted.by_probability().ids)
    np.testing.assert_array_equal(ours.draw_ids, wanted.draw_ids)
    for name in ("log_tail", "label_logprob", "draw_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), atol=2e-6)


def test_the_tap_makes_systematic_draws_as_the_extractor_does() -> None:
    settings = replace(SETTINGS, draw_method="systematic", draws=24, kept_draws=9)
    prompt, hidden = _prompt(60)
    spec: RequestSpec = {"number": 0, "sample_id": "a", "spans": [[3, 59]]}
    request = TappedRequest(spec, prompt=prompt, settings=settings)
    scorer = StepScorer(settings, vocab_size=V, block_bytes=20 * 8 * V, keeps=True, is_split=False)
    for first, stop in pairwise([0, 25, 60]):
        scorer.score([_piece(request, first, stop)], hidden[first:stop], lambda rows: rows @ HEAD)
    scorer.settle()
    positions = request.positions
    wanted = summarize(
        hidden[positions] @ HEAD,
        torch.tensor(prompt)[positions + 1],
        draw_uniforms(positions, draws=2, seed=3, sample_id="a"),
        top_k=6,
        min_prob=1e-4,
        kept_draws=9,
        token_count=490,
        draw_logprobs=True,
        systematic_draws=24,
    )
    wire = request.arrays.to_wire(positions.size)
    ours = Arrays.from_wire(wire, positions=positions.size, settings=settings).targets(draw_logprobs=True)
    assert ours.draw_ids.size > 200
    np.testing.assert_array_equal(ours.draw_counts, wanted.draw_counts)
    _assert_same(ours, wanted)


@pytest.mark.parametrize("borders", [[0, 60], [0, 1, 2, 30, 59, 60], [0, 25, 50, 60]])
def test_chunks_of_any_size_give_what_one_piece_gives(borders: list[int]) -> None:
    prompt, hidden = _prompt(60)
    request, scorer = _request(prompt, [[3, 20], [41, 59]]), _scorer()
    for first, stop in pairwise(borders):
        scorer.score([_piece(request, first, stop)], hidden[first:stop], lambda rows: rows @ HEAD)
    scorer.settle()
    _assert_same(_taken(request), _expected(prompt, hidden, request.positions, "a"))


def test_requests_that_share_a_step_do_not_mix() -> None:
    scorer = _scorer()
    made = [(_prompt(n, seed=n), f"id {n}") for n in (9, 40, 3, 77)]
    requests = [_request(prompt, [[0, len(prompt) - 1]], name) for (prompt, _), name in made]
    offsets = np.cumsum([0, *(len(prompt) for (prompt, _), _ in made)])
    pieces = [
        _piece(request, 0, len(prompt), int(offset))
        for request, ((prompt, _), _), offset in zip(requests, made, offsets, strict=False)
    ]
    padded = torch.cat([*(hidden for (_, hidden), _ in made), torch.zeros(13, WIDTH)])
    scorer.score(pieces, padded, lambda rows: rows @ HEAD)
    scorer.settle()
    for request, ((prompt, hidden), name) in zip(requests, made, strict=True):
        _assert_same(_taken(request), _expected(prompt, hidden, request.positions, name))


def test_rows_that_come_again_after_a_preemption_are_written_again_and_counted() -> None:
    prompt, hidden = _prompt(30)
    request, scorer = _request(prompt, [[0, 29]]), _scorer()
    for first, stop in ((0, 18), (0, 12), (12, 30)):
        scorer.score([_piece(request, first, stop)], hidden[first:stop], lambda rows: rows @ HEAD)
    scorer.settle()
    _assert_same(_taken(request), _expected(prompt, hidden, request.positions, "a"))
    assert request.recomputed == 18


def test_a_missing_position_is_named_and_never_zeros() -> None:
    prompt, hidden = _prompt(30)
    request, scorer = _request(prompt, [[4, 29]]), _scorer()
    scorer.score([_piece(request, 10, 30)], hidden[10:], lambda rows: rows @ HEAD)
    scorer.settle()
    assert request.problem(25) == "6 of 25 positions were never computed, the first is 4"


def test_a_request_with_a_logit_that_is_no_number_is_known_and_no_other() -> None:
    prompt, hidden = _prompt(30)
    hidden[17] = float("nan")
    request, healthy, scorer = _request(prompt, [[4, 29]]), _request(prompt, [[4, 17]]), _scorer()
    scorer.score([_piece(request, 0, 30), _piece(healthy, 0, 30)], hidden, lambda rows: rows @ HEAD)
    scorer.settle()
    assert not request.is_finite(25)
    assert request.is_finite(13)  # an answer that ended before it
    assert healthy.is_finite(13)
    assert request.problem(25) == healthy.problem(13) == ""
    _assert_same(_taken(healthy), _expected(prompt, hidden, healthy.positions, "a"))


@pytest.mark.parametrize("keeps", [True, False])
def test_the_head_is_called_as_often_if_the_extractor_fails(keeps: bool) -> None:
    """With a head that is split over processes, one that leaves the loop early would hang the others."""
    prompt, hidden = _prompt(90)
    calls: list[int] = []

    def head(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return torch.empty(0) if keeps else rows @ HEAD  # the extractor cannot use that

    request = _request(prompt, [[0, 89]])
    _scorer(keeps=keeps).score([_piece(request, 0, 90)], hidden, head)
    assert calls == [20, 20, 20, 20, 9]
    assert bool(request.failure) == keeps


@pytest.mark.parametrize("is_split", [True, False])
def test_blocks_are_halved_where_memory_runs_out(is_split: bool) -> None:
    """Not where the head is split over processes: they would part ways, so there it is a failure by name."""
    prompt, hidden = _prompt(90)
    calls: list[int] = []

    def head(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        if len(rows) > 30:
            raise torch.OutOfMemoryError("out of memory")
        return rows @ HEAD

    request, scorer = _request(prompt, [[0, 89]]), _scorer(block_bytes=64 * 8 * V, is_split=is_split)
    for _ in range(2):
        scorer.score([_piece(request, 0, 90)], hidden, head)
    scorer.settle()
    if is_split:
        assert calls == [64, 25] * 2
        assert request.failure == "OutOfMemoryError: out of memory"
    else:
        assert calls == [64, 32, 16, 16, 16, 16, 16, 9, 16, 16, 16, 16, 16, 9]
        _assert_same(_taken(request), _expected(prompt, hidden, request.positions, "a"))


def test_logits_stay_within_the_block() -> None:
    prompt, hidden = _prompt(400)
    most = 0

    def head(rows: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, rows.shape[0] * V * 4)
        return rows @ HEAD

    _scorer(block_bytes=32 * 8 * V).score([_piece(_request(prompt, [[0, 399]]), 0, 400)], hidden, head)
    assert most <= 32 * 8 * V


def test_an_answer_grows_by_a_position_at_a_time() -> None:
    """As many of its positions are taken as the answer has tokens; what was computed beyond its end is not."""
    prompt, hidden = _prompt(12)
    answer = [5, 6, 7, 8]
    _, later = _prompt(4, seed=1)
    request = TappedRequest({"number": 0, "sample_id": "a", "max_answer_tokens": 30}, prompt=prompt, settings=SETTINGS)
    scorer, states = _scorer(), torch.cat([hidden, later])
    for said, (first, stop) in enumerate([(0, 12), (12, 13), (13, 14), (14, 15)], start=1):
        part = request.wanted(first, stop)
        rows = request.positions[part] - first
        scorer.score(
            [Piece(request, part, rows, request.labels(part, answer[:said]))],
            states[first:stop],
            lambda rows: rows @ HEAD,
        )
    scorer.settle()
    assert request.problem(3) == request.problem(4) == ""
    assert "1 of 5 positions" in request.problem(5)
    assert "at most 30 were requested" in request.problem(31)
    wanted = _expected([*prompt, *answer], states, np.arange(11, 15), "a")
    _assert_same(
        Arrays.from_wire(request.arrays.to_wire(4), positions=4, settings=SETTINGS).targets(draw_logprobs=True), wanted
    )
