"""A student whose gradient has vanished ends its run by name; one that has little left to learn does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from coldstill.trainer.errors import VanishedGradient
from coldstill.trainer.step_record import VANISHED_STEPS
from tests.trainer.training import build

STEPS = VANISHED_STEPS + 4


def shrinking(model: torch.nn.Module, factor: Any) -> None:
    """Multiply the gradient of each weight by `factor()`."""
    for weight in model.parameters():
        weight.register_hook(lambda gradient: gradient * factor())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_reverse_kl_whose_student_writes_one_id_only_is_stopped(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: logits + 100 * (torch.arange(logits.shape[-1]) == 63))
    trainer, _ = build(
        tiny_dataset, model, tmp_path, loss="reverse_kl", max_steps=STEPS, max_grad_norm=max_grad_norm, fused_head=False
    )
    with pytest.raises(VanishedGradient, match=f"steps 1 to {VANISHED_STEPS}\\b") as raised:
        trainer.train()
    assert trainer.state.global_step == VANISHED_STEPS - 1
    assert "forward_kl" in str(raised.value)


def test_a_gradient_that_returns_within_the_steps_starts_the_count_again(
    tiny_dataset: Path, tiny_student: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    trainer, _ = build(tiny_dataset, model, tmp_path, loss="forward_kl", max_steps=2 * STEPS)
    shrinking(model, lambda: 1.0 if trainer.state.global_step == VANISHED_STEPS - 1 else 1e-12)
    with pytest.raises(VanishedGradient, match=f"steps {VANISHED_STEPS + 1} to {2 * VANISHED_STEPS}\\b"):
        trainer.train()


def test_a_small_gradient_of_a_small_loss_is_no_error(tiny_dataset: Path, tiny_student: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_student)
    loss = {"name": "taid", "schedule": "linear", "t_start": 0.0, "t_end": 1e-6}
    trainer, _ = build(tiny_dataset, model, tmp_path, loss=loss, max_steps=STEPS)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert max(line["loss"] for line in trainer.state.log_history if "loss" in line) < 0.1
