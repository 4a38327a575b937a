"""Laws of several teachers' losses from one pass over the logits: they are the weighted sum of each one on its own."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from coldstill.trainer.loss_kernels.ensemble import EnsembleTargets
from coldstill.trainer.loss_kernels.fused_head import Head, Objective, loss_on_hidden, loss_on_logits
from coldstill.trainer.loss_kernels.logit_view import PlainPasses
from coldstill.trainer.losses import LOSSES
from coldstill.trainer.losses.base import build_objective, join_objectives, state_of
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.targets import SparseTargets
from tests.trainer.loss_kernels.random_targets import plain_view
from tests.trainer.losses.scenes import cut, log_softmax

M, V, D = 7, 12, 5
SHARES = (0.5, 0.2, 0.3)
CHOSEN = {name: loss.model_validate({}) for name, loss in LOSSES.items()}
CHOSEN |= {"control_variate": Taid(tail="control_variate")}
CHOSEN |= {"mass_corrected": Taid(tail="mass_corrected"), "bucket": Taid(tail="bucket")}


def teachers(*, dense: bool = False) -> list[SparseTargets]:
    """Three teachers of other K and draws: one with unused entries, one without draws or with the whole vocabulary."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, V, M).tolist()
    found = []
    for top_k, draws, pads in ((3, 2, 2), (V if dense else 6, 0, 0), (2, 5, 0)):
        probs = log_softmax(2 * rng.standard_normal((M, V)))
        outside = np.argsort(-probs, axis=1)[:, top_k:]
        drawn = [rng.choice(row, draws).tolist() if draws else [] for row in outside]
        found.append(cut(probs, top_k=top_k, draws=drawn, labels=labels, pads=pads))
    return found


def objectives(name: str, of: list[SparseTargets]) -> list[Objective]:
    loss, least = CHOSEN[name], int(name in ("mass_corrected", "control_variate"))
    options = {"cross_entropy_share": 0.3, "any_rows": True}
    loss = loss.model_copy(update={key: options[key] for key in options.keys() & type(loss).model_fields.keys()})
    draws = [max(least, one.draws.shape[1]) for one in of]
    return [build_objective(loss, draws=count, mean_tail_mass=0.1, draw_logprobs=True) for count in draws]


def logits() -> torch.Tensor:
    return 2 * torch.randn(M, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", CHOSEN)
def test_values_and_gradients_are_the_weighted_sum_of_each_teacher_by_plain_autograd(name: str, dense: bool) -> None:
    of = teachers(dense=dense)
    leaf = logits().requires_grad_()
    each = zip(objectives(name, of), of, strict=True)
    parts = [one(plain_view(leaf, targets), targets, t=0.6) for one, targets in each]
    (wanted,) = torch.autograd.grad(sum(w * part.loss.sum() for w, part in zip(SHARES, parts, strict=True)), leaf)

    joined = join_objectives(objectives(name, of), SHARES)
    memory = logits()
    values = joined.forward_backward_(memory, EnsembleTargets.of(of), t=0.6, with_gradient=True)
    torch.testing.assert_close(memory, wanted, rtol=1e-9, atol=1e-11)
    for kind in ("loss", "distillation", "bucket_kl"):
        each = sum(w * getattr(part, kind) for w, part in zip(SHARES, parts, strict=True))
        torch.testing.assert_close(getattr(values, kind), each.detach(), rtol=1e-9, atol=1e-11)


def test_the_cross_entropy_of_the_labels_counts_once() -> None:
    of = teachers()
    found = join_objectives(objectives("forward_kl", of), SHARES).forward_backward_(
        logits(), EnsembleTargets.of(of), t=1.0, with_gradient=False
    )
    of_label = -logits().log_softmax(1)[torch.arange(M), of[0].labels]
    torch.testing.assert_close(found.loss, 0.7 * found.distillation + 0.3 * of_label)


class Counted(PlainPasses):
    """The plain passes over the logits, counted."""

    reads = writes = 0

    def read_(self, *args):
        self.reads += 1
        return super().read_(*args)

    def write_(self, *args):
        self.writes += 1
        return super().write_(*args)


def test_three_teachers_take_the_two_passes_of_one() -> None:
    of, passes = teachers(), Counted()
    joined = join_objectives(objectives("taid", of), SHARES)
    joined.forward_backward_(logits(), EnsembleTargets.of(of), t=0.4, with_gradient=True, passes=passes)
    assert (passes.reads, passes.writes) == (1, 1)


@pytest.mark.parametrize("chunk_bytes", [2 * V * 8, 1 << 20])
def test_the_fused_head_in_chunks_is_the_path_through_all_logits(chunk_bytes: int) -> None:
    of = EnsembleTargets.of(teachers())
    random = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(rows, D, generator=random, dtype=torch.float64) for rows in (M, V))
    found = []
    for fused in (True, False):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        objective = join_objectives(objectives("taid", teachers()), SHARES)
        if fused:
            head = Head(weight=leaves[1], bias=None, token_count=V)
            total, values = loss_on_hidden(leaves[0], head, of, objective, t=0.4, chunk_bytes=chunk_bytes)
        else:
            total, values = loss_on_logits(leaves[0] @ leaves[1].T, of, objective, t=0.4)
        total.backward()
        found.append([total.detach(), values.bucket_kl, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_the_union_holds_each_id_once_and_every_teacher_finds_its_own() -> None:
    of = teachers()
    union = EnsembleTargets.of(of)
    sides = torch.cat([one.ids for one in of], 1)
    assert torch.equal(union.ids.gather(1, union.columns), sides)
    assert union.kept.gather(1, union.columns).all()
    for m in range(M):
        ids = union.ids[m][union.kept[m]].tolist()
        assert sorted(ids) == sorted({id_ for one in of for id_ in one.ids[m][one.kept[m]].tolist()})


def test_parts_and_copies_hold_every_teacher() -> None:
    whole = EnsembleTargets.of(teachers())
    both = [whole.part(0, 3), whole.part(3, M)]
    for number, teacher in enumerate(whole.teachers):
        for name in ("ids", "logprobs", "log_tail", "draws", "draw_weights", "draw_logprobs", "label_logprob"):
            parts = torch.cat([getattr(part.teachers[number], name) for part in both])
            assert torch.equal(parts, getattr(teacher, name))
    assert torch.equal(torch.cat([part.columns for part in both]), whole.columns)
    copy = pickle.loads(pickle.dumps(whole.to("cpu")))
    assert torch.equal(copy.teachers[2].ids, whole.teachers[2].ids)


def test_the_tail_ratio_of_each_teacher_is_kept_and_restored_on_its_own() -> None:
    of = teachers()[::2]
    shares = (0.5, 0.5)
    objective = join_objectives(objectives("mass_corrected", of), shares)
    state = state_of(objective)
    objective.forward_backward_(logits(), EnsembleTargets.of(of), t=0.4, with_gradient=True)
    state.update(state.take().tolist(), step=1, total_steps=2)
    alone = []
    for targets, one in zip(of, objectives("mass_corrected", of), strict=True):
        one.forward_backward_(logits(), targets, t=0.4, with_gradient=True)
        state_of(one).update(state_of(one).take().tolist(), step=1, total_steps=2)
        alone.append(state_of(one).state_dict())
    assert [saved["tail_ratio"] for saved in state.state_dict()["teachers"]] == pytest.approx(
        [saved["tail_ratio"] for saved in alone]
    )
    assert set(state.logs()) == {"taid_tail_ratio_1", "taid_tail_ratio_2"}
    fresh = state_of(join_objectives(objectives("mass_corrected", of), shares))
    fresh.load_state_dict(state.state_dict())
    assert fresh.state_dict() == state.state_dict()
    fresh.reset()
    assert fresh.state_dict() == fresh.initial_state() == {"teachers": [{"tail_ratio": 1.0}] * 2}


def test_a_teacher_twice_is_that_teacher() -> None:
    (one, *_) = teachers()
    joined = join_objectives(objectives("taid", [one, one]), (0.5, 0.5))
    memory, wanted = logits(), logits()
    twice = joined.forward_backward_(memory, EnsembleTargets.of([one, one]), t=0.4, with_gradient=True)
    once = objectives("taid", [one])[0].forward_backward_(wanted, replace(one), t=0.4, with_gradient=True)
    torch.testing.assert_close(memory, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(twice.loss, once.loss, rtol=1e-12, atol=1e-13)
