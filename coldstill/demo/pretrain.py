"""Plain training of a small model on token blocks, with a checkpoint from which a killed run goes on.

Shape letters: `N` blocks, `B` blocks of a step, `T` tokens of a block, `V` vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

BLOCKS_PER_STEP = 2
"""B. The fewer tokens a step has the further equal tokens lead, measured on this text with blocks of 512: 510,000 end
at 4.46 nats with B = 4 and at 4.78 with B = 8; 200,000 at 4.90 with B = 2 and at 5.07 with B = 4 (that
one with AdamW at 0.01)."""

MATRIX_RATE, OTHER_RATE = 0.02, 5e-3
"""Peak learning rates: of Muon for matrices, of AdamW for embeddings and norms."""

WARMUP_STEPS = 20

SECONDS_BETWEEN_CHECKPOINTS = 15.0


def pack(documents: Sequence[Sequence[int]], *, block: int, seed: int) -> torch.Tensor:
    """`int64 [N, T = block]`: the documents in a random order, joined and cut; what fills no block is left out."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    stream = torch.tensor([token for index in order for token in documents[index]])
    blocks = stream.numel() // block
    return stream[: blocks * block].view(blocks, block)


def pretrain(model: Any, blocks: torch.Tensor, *, checkpoint: Path, label: str) -> float:
    """Train a transformers causal LM once over `blocks int64 [N, T]`, in their order; return the last steps' mean loss.

    Cross-entropy in nats per token. Muon moves the matrices inside the model and AdamW the rest: in so few steps they
    get further than AdamW alone. Both rates fall linearly to 0. `checkpoint` is removed by whoever keeps the result.
    """
    optimizers = _optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    steps = len(blocks) // BLOCKS_PER_STEP
    done, losses = _resume(checkpoint, model, optimizers)
    saved = time.monotonic()
    model.train()
    with tqdm(total=steps, initial=done, desc=label, unit="step") as bar:
        for step in range(done, steps):
            share = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
            loss = _loss(model, blocks[step * BLOCKS_PER_STEP : (step + 1) * BLOCKS_PER_STEP])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses = [*losses[-19:], loss.item()]
            bar.set_postfix_str(f"loss {sum(losses) / len(losses):.2f}", refresh=False)
            bar.update()
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _save(checkpoint, model, optimizers, step + 1, losses)
                saved = time.monotonic()
    return sum(losses) / max(1, len(losses))


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of tokens 1.. given those before, `tokens int64 [B, T]`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=_fast_bfloat16()):
        hidden = model.model(tokens).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden)
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: twice as fast there, many times slower elsewhere."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _save(path: Path, model: Any, optimizers: list[torch.optim.Optimizer], step: int, losses: list[float]) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    beside = path.with_name(f"{path.name}.unfinished")
    torch.save({"step": step, "losses": losses, "model": model.state_dict(), "optimizers": states}, beside)
    os.replace(beside, path)


def _resume(path: Path, model: Any, optimizers: list[torch.optim.Optimizer]) -> tuple[int, list[float]]:
    """Load the checkpoint, if there is one; return how many steps were done and their last losses."""
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["losses"]
