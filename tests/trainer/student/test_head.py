"""The formula of a head is proved before it is believed; what it cannot say falls back to the model's own logits."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaForCausalLM

from coldstill.trainer.student.forward import HeadFormula, find_head
from tests.trainer.student.families import FAMILIES, tiny
from tests.trainer.training import build


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_gives_the_model_s_own_logits(family):
    model = tiny(family).eval()
    formula, reason = find_head(model)
    assert formula is not None, reason
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(formula.logits(model, hidden), model(input_ids=tokens).logits)


def test_what_is_special_is_read_from_the_configuration():
    assert find_head(tiny("gemma2"))[0] == HeadFormula(softcap=3.0)
    assert find_head(tiny("granite"))[0] == HeadFormula(scale=0.25)
    assert find_head(tiny("cohere"))[0] == HeadFormula(scale=0.25)
    assert find_head(tiny("llama"))[0] == HeadFormula()


class Capped(LlamaForCausalLM):
    """A model that caps its logits and does not say so."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found


def test_a_cap_that_nobody_mentions_is_found_although_small_logits_hide_it(tiny_student):
    model = Capped.from_pretrained(tiny_student)
    formula, reason = find_head(model)
    assert formula is None
    assert "head alone" in reason


def test_a_head_that_is_no_plain_linear_layer_is_left_to_the_model(tiny_student):
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head
    formula, reason = find_head(model)
    assert formula is None
    assert "Sequential" in reason


def test_the_probe_leaves_the_model_as_it_was(tiny_student):
    model = LlamaForCausalLM.from_pretrained(tiny_student).train()
    find_head(model)
    assert model.training
    assert not model.base_model._forward_hooks


def test_a_special_head_trains_from_its_logits_with_a_message(tiny_dataset, tiny_student, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    trainer, gradients = build(tiny_dataset, Capped.from_pretrained(tiny_student), tmp_path, max_steps=1)
    assert "taken from its own logits" in caplog.text
    trainer.train()
    assert gradients.steps[0].abs().max() > 0
