"""The same laws for every family of students: fused as unfused, packed as unpacked, saved as plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from coldstill import load_logit_dataset
from coldstill.trainer.loss_kernels.fused_head import Objective
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.student.forward import distill_in_forward, model_inputs
from tests import making
from tests.trainer.student.families import FAMILIES, PADDED, tiny

T = 0.7


def steps(model: PreTrainedModel, batches: Iterable[dict[str, Any]], *, fused: bool) -> list[float]:
    """Plain gradient descent on `batches`, and the loss of each. AdamW would turn rounding of gradients near zero into
    steps of full size."""
    state = distill_in_forward(model, token_count=making.VOCABULARY, fused=fused)
    assert (state.formula is not None) == fused, state.reason
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for batch in batches:
        targets = batch["targets"]
        found = model(
            **model_inputs(batch), targets=targets, objective=Objective(Taid()), t=T, weight=1 / targets.count
        )
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(found["loss"].item())
    return losses


@pytest.fixture
def rows(tiny_dataset: Path) -> list[dict[str, Any]]:
    """Three batches of rows."""
    return list(load_logit_dataset(tiny_dataset).stream(batch_size=8, seed=0, epochs=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_loss_teaches_what_the_loss_of_the_logits_teaches(rows, tmp_path, family):
    plain = tiny(family)
    fused, before = copy.deepcopy(plain), copy.deepcopy(plain.state_dict())
    assert steps(fused, rows, fused=True) == pytest.approx(steps(plain, rows, fused=False), rel=1e-5)
    wanted = plain.state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in wanted.items())
    for name, weight in fused.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)

    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain)
    assert loaded.get_output_embeddings().weight.shape[0] == PADDED
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, fused.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_step_is_the_step_of_the_rows_apart(tiny_dataset, family):
    apart = tiny(family)
    packed = copy.deepcopy(apart)
    dataset = load_logit_dataset(tiny_dataset)
    whole = list(dataset.stream(batch_size=dataset.rows, seed=0, epochs=1))
    packs = list(dataset.stream(batch_size=dataset.rows, seed=0, epochs=1, pack_length=48))
    assert len(whole) == len(packs) == 1
    assert packs[0]["input_ids"].shape[0] < dataset.rows / 2
    assert steps(packed, packs, fused=True) == pytest.approx(steps(apart, whole, fused=True), rel=1e-5)
    for name, weight in packed.state_dict().items():
        torch.testing.assert_close(weight, apart.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "gpt2"])
def test_generation_does_not_notice_the_distilling_forward(family):
    model = tiny(family)
    prompt = {"input_ids": torch.tensor([[3, 5, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    wanted = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    distill_in_forward(model, token_count=making.VOCABULARY)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), wanted)
