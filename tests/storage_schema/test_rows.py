"""Laws of rows: alignment of targets with tokens, and what a distribution is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.storage_schema.errors import InvalidRow, InvalidTargets
from coldstill.storage_schema.rows import CachedRow, TeacherTargets, span_positions, spans_from_mask
from tests import making


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_target_position_t_scores_token_t_plus_1(loss_mask: list[bool]) -> None:
    positions = span_positions(spans_from_mask(loss_mask)).tolist()
    assert [position + 1 for position in positions] == [
        token for token, bit in enumerate(loss_mask) if bit and token > 0
    ]


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_spans_are_the_fewest_runs(loss_mask: list[bool]) -> None:
    spans = spans_from_mask(loss_mask)
    assert (spans[:, 0] < spans[:, 1]).all()
    assert (spans[1:, 0] > spans[:-1, 1]).all()


def test_labels_are_the_tokens_that_really_follow() -> None:
    row = making.random_row(np.random.default_rng(0), "a", length=12)
    for position, label in zip(row.positions, row.labels, strict=True):
        assert label == row.token_ids[position + 1]


def test_slices_join_to_the_whole() -> None:
    targets = making.random_row(np.random.default_rng(1), "a", length=30).targets
    parts = [targets.slice(0, 5), targets.slice(5, targets.positions)]
    for name in ("ids", "logprobs", "counts", "log_tail", "label_logprob", "draw_ids", "draw_counts"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(targets, name))


def _row() -> CachedRow:
    return making.random_row(np.random.default_rng(2), "a", length=12)


def _changed(targets: TeacherTargets, name: str, index: object, value: float) -> TeacherTargets:
    array = getattr(targets, name).copy()
    array[index] = value
    return replace(targets, **{name: array})


def test_a_row_that_satisfies_every_law_is_accepted() -> None:
    _row().check(token_count=making.VOCABULARY)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("ids", (0, 0), making.VOCABULARY, "ids"),
        ("ids", (0, 0), -1, "ids"),
        ("logprobs", (0, 0), 0.5, "logprobs"),
        ("logprobs", (0, 0), np.nan, "logprobs"),
        ("logprobs", (0, 0), -20.0, "mass of position 0"),
        ("counts", 0, 0, "counts"),
        ("counts", 0, 99, "counts"),
        ("log_tail", 0, -np.inf, "mass of position 0"),
        ("label_logprob", 0, np.inf, "label_logprob"),
        ("draw_ids", 0, making.VOCABULARY, "draw_ids"),
    ],
)
def test_targets_that_are_no_distribution_are_refused(name: str, index: object, value: float, message: str) -> None:
    targets = _changed(_row().targets, name, index, value)
    with pytest.raises(InvalidTargets, match=message):
        targets.check(token_count=making.VOCABULARY)


def test_an_id_kept_twice_is_refused() -> None:
    targets = _row().targets
    with pytest.raises(InvalidTargets, match="kept twice"):
        _changed(targets, "ids", (0, 1), targets.ids[0, 0]).check(token_count=making.VOCABULARY)


def test_a_draw_among_the_kept_ids_is_refused() -> None:
    targets = _row().targets
    owner = int(np.flatnonzero(targets.draw_counts)[0])
    with pytest.raises(InvalidTargets, match="draw among the kept"):
        _changed(targets, "draw_ids", 0, targets.ids[owner, 0]).check(token_count=making.VOCABULARY)


@pytest.mark.parametrize(
    "spans", [[[0, 12]], [[3, 3]], [[4, 2]], [[5, 7], [2, 4]], [[-1, 2]], []], ids=lambda spans: str(spans)
)
def test_spans_that_leave_the_row_or_overlap_are_refused(spans: list[list[int]]) -> None:
    row = replace(_row(), target_spans=np.array(spans, np.int32).reshape(-1, 2))
    with pytest.raises(InvalidRow, match="target_spans"):
        row.check(token_count=making.VOCABULARY)


def test_a_row_with_too_few_distributions_is_refused() -> None:
    row = _row()
    with pytest.raises(InvalidRow, match="one per target position"):
        replace(row, targets=row.targets.slice(1, row.targets.positions)).check(token_count=making.VOCABULARY)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRow, match="token_ids"):
        _row().check(token_count=3)
