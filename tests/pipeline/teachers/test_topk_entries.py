"""Laws of K entries in place of a whole distribution: what is kept, and what is no distribution. The rest:
test_vllm_public_path.py, through the first reader that was built on it."""

from __future__ import annotations

import numpy as np
import pytest

from coldstill.pipeline.errors import TeacherOutputInvalid
from coldstill.pipeline.teachers.topk_entries import targets_of_entries
from coldstill.storage_schema.rows import TeacherTargets


def _targets(ids: list[int], logprobs: list[float], *, label: int = 0, label_logprob: float = -1.0) -> TeacherTargets:
    return targets_of_entries(
        np.array([label]),
        np.array([label_logprob]),
        np.array([ids]),
        np.array([logprobs]),
        min_prob=0,
        token_count=10,
        where="here",
        fix="there",
    )


def test_entries_may_come_in_any_order() -> None:
    logprobs = np.log([0.1, 0.5, 0.1, 0.2]).tolist()
    assert _targets([9, 3, 4, 2], logprobs).ids.tolist() == [[3, 2, 4, 9]]


def test_an_entry_without_mass_is_not_kept() -> None:
    targets = _targets([1, 2, 3], [-1.0, -np.inf, -2.0], label=2, label_logprob=-np.inf)
    targets.check(token_count=10)
    assert targets.counts.tolist() == [2]


@pytest.mark.parametrize(
    ("ids", "logprobs", "what"),
    [
        ([1, 2], [5.0, 3.0], "mass"),  # logits
        ([1, 2], [-0.1, -0.2], "mass"),
        ([1, 2], [-1.0, np.inf], "mass"),
        ([1, 2], [-1.0, np.nan], "not a number"),
        ([1, 2], [-np.inf, -np.inf], "no entry"),
        ([10, 11], [-1.0, -2.0], "no entry"),  # padding rows of the head
    ],
)
def test_what_is_no_distribution_is_an_error(ids: list[int], logprobs: list[float], what: str) -> None:
    with pytest.raises(TeacherOutputInvalid, match=what):
        _targets(ids, logprobs)
