"""A wrapper of the student may change the sequence: its positions are found by a probe, in training and evaluation."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    CPTConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaForCausalLM

from coldstill import load_logit_dataset
from coldstill.trainer.data.collate import collate
from coldstill.trainer.errors import PackingUnsupported, WrapperUnsupported
from coldstill.trainer.evaluation.evaluate import evaluate_student
from coldstill.trainer.student.forward import innermost
from coldstill.trainer.student.wrapper import Wrapping, find_wrapping
from tests import making
from tests.trainer.student.families import tiny
from tests.trainer.training import build

TASK = {"task_type": "CAUSAL_LM"}
PROMPTS: dict[str, tuple[Any, Wrapping]] = {
    "prompt tuning": (PromptTuningConfig(**TASK, num_virtual_tokens=3), Wrapping(3, False)),
    "p-tuning": (PromptEncoderConfig(**TASK, num_virtual_tokens=3, encoder_hidden_size=8), Wrapping(3, False)),
    "prefix tuning": (PrefixTuningConfig(**TASK, num_virtual_tokens=3), Wrapping(0, False)),
    "context tuning": (
        CPTConfig(**TASK, cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
        Wrapping(2, False),
    ),
}
INSIDE = {
    "lora": LoraConfig(**TASK, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(**TASK, target_modules="all-linear", use_dora=True, init_lora_weights=False),
    "head": LoraConfig(**TASK, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    "ia3": IA3Config(**TASK, init_ia3_weights=False),
    "whole head": LoraConfig(**TASK, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def wrapped(config: Any, family: str = "llama") -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny(family), config)


def own_gradients(model: Any, batch: dict[str, Any], added: int) -> torch.Tensor:
    """Of the mean cross-entropy with the labels, by the wrapper's public forward and torch alone."""
    targets = batch["targets"]
    model.train()
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    picked = logits[targets.row, targets.position + added, : making.VOCABULARY]
    torch.nn.functional.cross_entropy(picked, targets.labels).backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_shift_the_targets_in_training_and_in_evaluation(tiny_dataset, tmp_path, name, fused):
    config, wanted = PROMPTS[name]
    model = wrapped(config)
    dataset = load_logit_dataset(tiny_dataset)
    batch = next(iter(dataset.stream(batch_size=8, seed=0, epochs=1)))
    trainer, gradients = build(
        dataset, model, tmp_path, loss="cross_entropy", fused_head=fused, max_steps=1, per_device_train_batch_size=8
    )
    assert trainer.head.wrapping == wanted
    expected = own_gradients(model, batch, wanted.added)
    assert expected.abs().max() > 0

    rows = list(dataset.stream(batch_size=8, seed=0, epochs=1, shuffle=False))
    total, count = 0.0, 0
    model.eval()
    for part in rows:
        targets = part["targets"]
        with torch.no_grad():
            logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        picked = logits[targets.row, targets.position + wanted.added, : making.VOCABULARY]
        total += float(torch.nn.functional.cross_entropy(picked, targets.labels, reduction="sum"))
        count += targets.count
    measured = trainer.evaluate(dataset)["eval_cross_entropy"]
    assert measured == pytest.approx(total / count, rel=1e-5)
    bare = evaluate_student(innermost(model), rows, token_count=making.VOCABULARY).metrics()["cross_entropy"]
    assert bare != pytest.approx(measured, rel=1e-4)

    trainer.train()
    torch.testing.assert_close(gradients.steps[0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", INSIDE)
def test_adapters_inside_the_layers_leave_the_sequence_alone(name):
    model = wrapped(INSIDE[name])
    assert find_wrapping(model, innermost(model)) == Wrapping()


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "gemma3_text", "granite", "cohere"])
def test_the_probe_finds_the_offset_in_every_family(family):
    model = wrapped(PromptTuningConfig(**TASK, num_virtual_tokens=5), family)
    assert find_wrapping(model, innermost(model)) == Wrapping(5, False)
    model = wrapped(LoraConfig(**TASK, target_modules="all-linear", init_lora_weights=False), family)
    assert find_wrapping(model, innermost(model)) == Wrapping()


class Around(torch.nn.Module):
    """A wrapper of nobody's library."""

    def __init__(self, model: torch.nn.Module, change: Any):
        super().__init__()
        self.module, self._change = model, change

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **given: Any) -> Any:
        return self.module(input_ids=self._change(input_ids), **given)


def doubled(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.repeat_interleave(2, dim=1)


def reversed_(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flip(1)


def in_front(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(tokens[:, :2], 7), tokens], 1)


def at_the_end(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens, torch.full_like(tokens[:, :2], 7)], 1)


def after_the_first(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens[:, :1], torch.full_like(tokens[:, :2], 7), tokens[:, 1:]], 1)


@pytest.mark.parametrize("change", [doubled, reversed_, after_the_first])
def test_a_wrapper_without_one_offset_for_all_tokens_is_refused_by_name(tiny_dataset, tmp_path, change):
    with pytest.raises(WrapperUnsupported, match="Around"):
        build(tiny_dataset, Around(tiny("llama"), change), tmp_path)


def test_a_wrapper_of_nobody_s_library_is_measured_too():
    model = tiny("llama")
    assert find_wrapping(Around(model, in_front), model) == Wrapping(2, False)
    assert find_wrapping(Around(model, at_the_end), model) == Wrapping(0, False)
    assert find_wrapping(Around(model, lambda tokens: tokens), model) == Wrapping()


def test_a_wrapper_that_needs_more_arguments_is_refused_with_its_own_words(tiny_dataset, tmp_path):
    model = wrapped(MultitaskPromptTuningConfig(**TASK, num_virtual_tokens=3, num_tasks=2))
    with pytest.raises(WrapperUnsupported, match="task_ids"):
        build(tiny_dataset, model, tmp_path)


@pytest.mark.parametrize("name", ["prompt tuning", "prefix tuning"])
def test_packs_and_virtual_tokens_exclude_each_other(tiny_dataset, tmp_path, name):
    with pytest.raises(PackingUnsupported, match="virtual tokens"):
        build(tiny_dataset, wrapped(PROMPTS[name][0]), tmp_path, pack_length=48)


def test_gradient_checkpointing_that_would_drop_the_prefix_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(WrapperUnsupported, match="checkpointing"):
        build(tiny_dataset, wrapped(PROMPTS["prefix tuning"][0]), tmp_path, gradient_checkpointing=True)
    build(tiny_dataset, wrapped(PROMPTS["prompt tuning"][0]), tmp_path, gradient_checkpointing=True)


def test_a_head_that_is_trained_whole_keeps_the_fused_loss(tiny_dataset, tmp_path):
    batch = collate([making.random_row(np.random.default_rng(0), f"r{n}") for n in range(4)])
    losses, heads = [], []
    for fused in (True, False):
        trainer, _ = build(tiny_dataset, wrapped(INSIDE["whole head"]), tmp_path, fused_head=fused)
        assert (trainer.head.formula is not None) == fused, trainer.head.reason
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        head = innermost(trainer.model).get_output_embeddings()
        heads.append(head.modules_to_save["default"].weight.grad)
        assert head.original_module.weight.grad is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert heads[0].abs().max() > 0
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-6)


def test_the_message_about_an_adapter_on_the_head_does_not_contradict_itself(tiny_dataset, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    build(tiny_dataset, wrapped(INSIDE["head"]), tmp_path)
    assert "its head has an adapter" in caplog.text
    assert "a Linear, not" not in caplog.text


def test_an_unwrapped_model_is_not_probed(tiny_student, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("it was called"))
    assert find_wrapping(model, model) == Wrapping()
