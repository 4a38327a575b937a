"""Losses on kept ids that are not the most probable ones, as a capture with `source.score_ids` stores them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.losses import LOSSES
from coldstill.trainer.losses.divergences import ReverseKl
from coldstill.trainer.targets import SparseTargets
from tests import making, reference
from tests.trainer.losses.scenes import cut, log_softmax, scene, value_and_gradient

NAMED = [2, 3, 5, 8, 11, 13, 17]
SPREAD = 4000
"""Tokens into which the tail is cut, so that none is as probable as a kept id."""


def _kept(teacher: np.ndarray, ids: list[int]) -> SparseTargets:
    """Targets of dense log-probs `[M, V]` that keep `ids`; the label is the first of them."""
    count = len(teacher)
    rest = np.delete(np.exp(teacher), ids, axis=1).sum(1)
    whole = cut(teacher, top_k=len(ids), labels=[ids[0]] * count)
    return replace(
        whole,
        ids=torch.tensor([ids] * count),
        logprobs=torch.from_numpy(teacher[:, ids]),
        log_tail=torch.from_numpy(np.log(rest)),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_the_kept_ids_as_a_set_and_not_as_the_most_probable_ones(name: str) -> None:
    """It gives what it gives for a top-K cache of the same masses, whose tail is many tokens that are all rare."""
    random = np.random.default_rng(5)
    student, teacher = random.standard_normal((6, 20)), log_softmax(random.standard_normal((6, 20)))
    q = log_softmax(student)
    spread_teacher, spread_student = (
        np.concatenate(
            [
                log_p[:, NAMED],
                np.log(np.delete(np.exp(log_p), NAMED, 1).sum(1, keepdims=True) / SPREAD).repeat(SPREAD, 1),
            ],
            axis=1,
        )
        for log_p in (teacher, q)
    )
    columns = list(range(len(NAMED)))
    assert (np.argsort(-spread_teacher, 1)[:, : len(NAMED)] < len(NAMED)).all()
    assert (np.argsort(-teacher, 1)[:, : len(NAMED)] != NAMED).any()
    loss = LOSSES[name](**({"tail": "bucket"} if "bucket" in LOSSES[name].tails() else {}))
    found, gradient = value_and_gradient(loss, student, _kept(teacher, NAMED), 0.6)
    wanted, other = value_and_gradient(loss, spread_student, _kept(spread_teacher, columns), 0.6)
    np.testing.assert_allclose(found.loss.numpy(), wanted.loss.numpy(), atol=1e-10)
    np.testing.assert_allclose(gradient[:, NAMED], other[:, columns], atol=1e-10)


def test_reverse_kl_on_the_students_support_is_the_dense_one_restricted() -> None:
    student, teacher, _ = scene()
    for m in range(6):
        q, p = reference.softmax(student[m]), np.exp(teacher[m])
        support = np.argsort(-q)[:12].tolist()
        values, _ = value_and_gradient(ReverseKl(), student[m : m + 1], _kept(teacher[m : m + 1], support))
        rest = [v for v in range(20) if v not in support]
        restricted = reference.kl(np.append(q[support], q[rest].sum()), np.append(p[support], p[rest].sum()))
        assert values.loss[0].item() == pytest.approx(restricted, abs=1e-12)
        # What is lost is at most the divergence within the student's tail, weighted by its mass.
        inside = q[rest].sum() * reference.kl(q[rest] / q[rest].sum(), p[rest] / p[rest].sum())
        assert reference.kl(q, p) - restricted == pytest.approx(inside, abs=1e-12)


def test_a_bound_of_kept_ids_as_wide_as_the_vocabulary_is_no_dense_cache(tmp_path: Path) -> None:
    tokenizer = making.tiny_tokenizer(tmp_path / "tokenizer")
    for kept_ids, is_dense in (("top_k", True), ("top_k_and_named", False)):
        header = making.tiny_header(tokenizer, top_k=making.VOCABULARY, draws=0, kept_ids=kept_ids)
        root = tmp_path / kept_ids
        row = making.random_row(np.random.default_rng(0), "a", top_k=making.VOCABULARY, draws=0)
        making.write_dataset(root, [[row]], header=header, tokenizer=tokenizer)
        assert load_logit_dataset(root).is_dense == is_dense
