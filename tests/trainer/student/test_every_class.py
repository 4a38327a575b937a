"""Students of every class: the distilling loss is that of the class's own logits, and of the terms that it adds."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from coldstill import load_logit_dataset
from coldstill.trainer.errors import ExtraLossUnsupported
from coldstill.trainer.evaluation.measured_model import LogitReader, measuring
from coldstill.trainer.loss_kernels.fused_head import Objective, loss_on_logits
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.student.forward import distill_in_forward, model_inputs
from tests import making
from tests.trainer.student.families import tiny, tiny_of

CLASSES = {
    # The forward calls a decoder inside the body, and OPT projects the hidden states after it.
    **{kind: {} for kind in ("opt", "bart", "mbart", "pegasus", "marian", "biogpt", "xglm", "trocr")},
    # The head transforms the hidden states before its linear layer.
    **{kind: {} for kind in ("bert", "roberta", "modernbert-decoder", "megatron-bert")},
    # The scale is applied before the head, after it, or both.
    "minicpm3": {"dim_model_base": 8},
    "nanochat": {},
    "vaultgemma": {"final_logit_softcapping": 3.0},
    # The name of the body is not the one that the class declares.
    "llama4_text": {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    # Its soft-cap has another name.
    "recurrent_gemma": {"attention_window_size": 8, "lru_width": 32, "logits_soft_cap": 3.0},
    # No attention.
    "mamba": {},
}
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "granitemoe", "jetmoe", "ernie4_5_moe")
T = 0.7


@pytest.fixture
def batch(tiny_dataset: Path) -> dict[str, Any]:
    return next(iter(load_logit_dataset(tiny_dataset).stream(batch_size=8, seed=0, epochs=1)))


def step(model: PreTrainedModel, batch: dict[str, Any], *, share: float = 1.0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one micro-batch that holds `share` of the step's targets."""
    targets = batch["targets"]
    weight = share / targets.count
    loss = model(**model_inputs(batch), targets=targets, objective=Objective(Taid()), t=T, weight=weight)["loss"]
    loss.backward()
    return loss.item(), {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


def step_of_own_logits(
    model: PreTrainedModel, batch: dict[str, Any], *, coefficient: float = 0.0, share: float = 1.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by the class's own forward, and `coefficient` times the auxiliary loss that it returns."""
    targets = batch["targets"]
    output = model(**model_inputs(batch), use_cache=False)
    logits = output.logits[targets.row, targets.position, : making.VOCABULARY]
    loss, _ = loss_on_logits(logits, targets, Objective(Taid()), t=T, weight=share / targets.count)
    if coefficient:
        loss = loss + share * coefficient * output.aux_loss
    loss.backward()
    return loss.item(), {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


def assert_equal_steps(found: tuple[float, dict[str, Any]], wanted: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    # Some gradients are zero but for rounding, such as those of the biases of keys.
    largest = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, wanted[1][name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("kind", CLASSES)
def test_fused_loss_and_gradients_are_those_of_the_own_logits(batch, kind):
    model = tiny_of(kind, **CLASSES[kind])
    plain = copy.deepcopy(model)
    state = distill_in_forward(model, token_count=making.VOCABULARY)
    assert state.formula is not None, state.reason
    assert_equal_steps(step(model, batch), step_of_own_logits(plain, batch))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", EXPERTS)
def test_the_auxiliary_loss_of_experts_is_added_as_the_class_adds_it(batch, kind, fused):
    model = tiny_of(kind, output_router_logits=True)
    plain = copy.deepcopy(model)
    coefficient = 3.0
    for one in (model, plain):
        setattr(one, "aux_loss_coef" if kind == "jetmoe" else "router_aux_loss_coef", coefficient)
    state = distill_in_forward(model, token_count=making.VOCABULARY, fused=fused)
    assert (state.formula is not None) == fused
    assert_equal_steps(
        step(model, batch, share=0.25), step_of_own_logits(plain, batch, coefficient=coefficient, share=0.25)
    )
    without = tiny_of(kind, output_router_logits=False)
    distill_in_forward(without, token_count=making.VOCABULARY)
    assert step(model, batch)[0] > step(without, batch)[0] + 1


def test_the_loss_function_of_the_model_is_as_before(batch):
    model = tiny_of("mixtral", output_router_logits=True)
    before = model.loss_function
    distill_in_forward(model, token_count=making.VOCABULARY)
    step(model, batch)
    assert model.loss_function is before
    assert "_loss_function" not in vars(model)


def test_a_class_without_an_auxiliary_loss_is_named_if_one_is_requested(caplog):
    logging.getLogger("transformers").propagate = True
    distill_in_forward(tiny("llama"), token_count=making.VOCABULARY)
    assert "auxiliary" not in caplog.text
    model = tiny("llama")
    model.config.output_router_logits = True
    distill_in_forward(model, token_count=making.VOCABULARY)
    assert "LlamaForCausalLM computes no auxiliary loss" in caplog.text


def test_an_auxiliary_loss_that_cannot_be_separated_is_a_named_error(monkeypatch):
    model = tiny_of("mixtral", output_router_logits=True)
    plain = type(model).forward

    def forward(self: PreTrainedModel, *args: Any, labels: Any = None, **inputs: Any) -> Any:
        output = plain(self, *args, **inputs)
        output.loss = torch.nn.functional.cross_entropy(output.logits[0], labels[0]) + output.aux_loss
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ExtraLossUnsupported, match="does not call its loss_function"):
        distill_in_forward(model, token_count=making.VOCABULARY)


@pytest.mark.parametrize("fused", [True, False])
def test_a_head_that_the_forward_never_calls_is_left_to_the_model(batch, monkeypatch, fused):
    model = tiny("llama")
    head = model.lm_head
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, labels=None, return_dict=True, **inputs: _with_logits(self, self.model(**inputs)),
    )
    plain = copy.deepcopy(model)
    state = distill_in_forward(model, token_count=making.VOCABULARY, fused=fused)
    assert state.formula is None
    assert state.reason
    assert head.weight is model.lm_head.weight
    assert_equal_steps(step(model, batch), step_of_own_logits(plain, batch))


def _with_logits(model: Any, output: Any) -> Any:
    output.logits = torch.nn.functional.linear(output.last_hidden_state, model.lm_head.weight)
    return output


@pytest.mark.parametrize("kind", ["opt", "bart", "minicpm3", "bert"])
def test_evaluation_reads_the_own_logits(batch, kind):
    model = tiny_of(kind, **CLASSES[kind])
    targets = batch["targets"]
    with measuring(model):
        wanted = model(**model_inputs(batch)).logits[targets.row, targets.position, : making.VOCABULARY]
        found = LogitReader(model, token_count=making.VOCABULARY).read(batch, targets)(0, targets.count)
    torch.testing.assert_close(found, wanted)


UNTRIED = ("falcon_h1", "kimi_linear", "gemma4_text", "nemotron_h")
"""Without their GPU kernels, or by their size, these take 5 to 50 seconds each. All four have equal losses."""


@pytest.mark.slow
def test_no_class_of_transformers_ends_in_an_error_of_the_library(batch):
    """Each class that can be built small and runs has equal losses; the classes of a later release are included."""
    tried, other = 0, {}
    for config in MODEL_FOR_CAUSAL_LM_MAPPING:
        if config.sub_configs or config.model_type in UNTRIED:
            continue
        try:
            model = tiny_of(config.model_type)
            wanted = step_of_own_logits(copy.deepcopy(model), batch)
        except Exception:  # Sizes that this class does not accept.
            continue
        tried += 1
        state = distill_in_forward(model, token_count=making.VOCABULARY)
        if state.formula is None:
            other[config.model_type] = state.reason
        assert_equal_steps(step(model, batch), wanted)
    assert tried > 120
    # Prophetnet's logits have another axis before the head.
    assert set(other) <= {"prophetnet"}, other
