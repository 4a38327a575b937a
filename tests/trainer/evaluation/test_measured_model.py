"""Logits at target positions, read in parts, equal those of the model's own forward pass for every kind of head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from coldstill.trainer.evaluation.figures import cache_figures
from coldstill.trainer.evaluation.measured_model import LogitReader, measuring
from coldstill.trainer.loss_kernels.fused_head import Objective
from coldstill.trainer.losses.taid import ForwardKl
from coldstill.trainer.student.forward import distill_in_forward, model_inputs
from tests import making
from tests.trainer.evaluation.batches import packed, padded, random_rows

V = making.VOCABULARY
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def adapted_head() -> Any:
    return get_peft_model(llama(), LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))


MODELS = {
    "llama": llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    "gemma2, capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.05, sliding_window=8)
    ),
    "granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=7.0)),
    "cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "with adapters": lambda: get_peft_model(llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False)),
    "with an adapter on the head": adapted_head,
}


@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("name", MODELS)
def test_parts_equal_the_models_own_logits(name: str, make_batch: Any) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    batch = make_batch([row for row, _ in random_rows(1, 4)])
    targets = batch["targets"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    with measuring(model):
        own = model(**inputs, use_cache=False).logits[targets.row, targets.position]
        read = LogitReader(model, token_count=V - 3).read(batch, targets)
        for start, stop in ((0, 3), (3, targets.count), (0, targets.count)):
            torch.testing.assert_close(read(start, stop), own[start:stop, : V - 3], rtol=1e-10, atol=1e-12)


def test_the_head_is_applied_to_the_requested_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    batch = padded([row for row, _ in random_rows(2, 4)])
    with measuring(model):
        reader = LogitReader(model, token_count=V)
        head = model.get_output_embeddings()
        monkeypatch.setattr(head, "forward", lambda hidden: pytest.fail("the head ran over all positions"))
        read = reader.read(batch, batch["targets"])
        assert read(0, 2).shape == (2, V)


@pytest.mark.parametrize("name", ["llama", "gemma2, capped", "granite, scaled", "with adapters"])
def test_logits_are_not_rounded_to_16_bits_where_the_layers_are(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batch = padded([row for row, _ in random_rows(3, 4)])
    targets = batch["targets"]
    distill_in_forward(model, token_count=V)
    with measuring(model), torch.autocast("cpu", torch.bfloat16):
        measured = LogitReader(model, token_count=V).read(batch, targets)(0, targets.count)
        values = model(**model_inputs(batch), targets=targets, objective=Objective(ForwardKl(tail="bucket")), t=1.0)
    kl = cache_figures(measured, targets, draws=0)["forward_kl_lower_bound"]
    # What is measured during a training is what its log says, to the last digits of float32.
    torch.testing.assert_close(kl.float(), values["values"].bucket_kl, rtol=0, atol=2e-6)
