"""Run by `test_triton_passes` in a process of its own, with Triton's interpreter on: JSON of each case's results.

TRITON_INTERPRET=1 python -m tests.trainer.loss_kernels.triton_cases
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from coldstill.trainer.loss_kernels.logit_view import PlainPasses
from coldstill.trainer.loss_kernels.row_passes import LARGEST_DIFFERENCE, RowPasses, difference
from tests.trainer.loss_kernels.random_targets import OBJECTIVES, plain_view, random_targets

BLOCK = 8192
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "rounded to bfloat16": {"bfloat16": True},
    "one kept id": {"top_k": 1},
    "no draws at all": {"most_draws": 0},
    "many kept ids and draws": {"top_k": 33, "most_draws": 17},
    "no tail": {"vocabulary": 12, "top_k": 12, "most_draws": 0},
    "a vocabulary below a block": {"vocabulary": 37},
    "a vocabulary of one block": {"vocabulary": BLOCK},
    "a vocabulary of a block and one": {"vocabulary": BLOCK + 1},
    "a vocabulary of several blocks": {"vocabulary": 3 * BLOCK - 5},
    "a tail that underflows": {"scale": 400.0},
    "one position": {"positions": 1},
    "rows apart in memory": {"gap": 3},
    "no positions": {"positions": 0},
}


def result(
    passes: RowPasses,
    *,
    positions: int = 9,
    vocabulary: int = 300,
    top_k: int = 5,
    most_draws: int = 4,
    scale: float = 4.0,
    bfloat16: bool = False,
    gap: int = 0,
) -> dict[str, float]:
    """Largest error of the values and of the gradient against plain autograd in float64, and their sizes."""
    random = torch.Generator().manual_seed(3)
    memory = scale * torch.randn(positions, vocabulary + gap, generator=random)
    logits = (memory.bfloat16().float() if bfloat16 else memory)[:, :vocabulary]
    leaf = logits.double().requires_grad_()
    shape = (positions, vocabulary)
    targets = random_targets(*shape, top_k=top_k, most_draws=most_draws, dtype=torch.float32)
    found = OBJECTIVES["bucket with a share of cross-entropy"] if most_draws == 0 else OBJECTIVES["taid"]
    values = found.forward_backward_(logits, targets, t=0.4, with_gradient=True, passes=passes)
    if positions == 0:
        return {"values": float(values.loss.numel()), "gradient": float(logits.numel()), "size": 1.0}
    exact = random_targets(*shape, top_k=top_k, most_draws=most_draws)
    wanted = found(plain_view(leaf, exact), exact, t=0.4)
    (gradient,) = torch.autograd.grad(wanted.loss.sum(), leaf)
    return {
        "values": float(((values.loss - wanted.loss).abs() / (1 + wanted.loss.abs())).max()),
        "gradient": float((logits - gradient).abs().max()),
        "size": float(gradient.abs().max()),
    }


def main() -> None:
    """Print the results."""
    from coldstill.trainer.loss_kernels import triton_passes

    class Wrong(triton_passes.TritonPasses):
        def write_(self, logits: Any, targets: Any, readings: Any, gradient: Any) -> torch.Tensor:
            """Lose every second draw of the same id."""
            first = targets.draws != targets.draws.roll(1, 1)
            wrong = dataclasses.replace(gradient, at_draws=gradient.at_draws * first)
            return super().write_(logits, targets, readings, wrong)

    assert BLOCK == triton_passes.BLOCK
    cpu = torch.device("cpu")
    right = triton_passes.TritonPasses()
    results: dict[str, Any] = {name: result(right, **case) for name, case in CASES.items()}
    results["self-check"] = difference(right, PlainPasses(), cpu) <= LARGEST_DIFFERENCE
    results["self-check of wrong passes"] = difference(Wrong(), PlainPasses(), cpu) <= LARGEST_DIFFERENCE
    print(json.dumps(results))


if __name__ == "__main__":
    main()
