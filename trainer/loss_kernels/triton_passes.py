"""The two passes over `[M, V]` logits as Triton kernels, one program per position.

Shape letters: `M` target positions, `V` vocabulary, `K` teacher top-k, `N` padded draws.

`RowPasses` in `row_passes.py` is the contract. This file imports Triton, so only `logit_view.py`, on a GPU, and tests
import it.

The logits are moved three times: one read for maximum and sum together (online softmax, arXiv 1805.02867), and one read
and one write for the gradient. `PlainPasses` moves them six times; it is the reference in tests and in the self-check
on each GPU.

Checked in Triton's interpreter on a CPU only, NOT YET MEASURED ON A GPU: `BLOCK` and `WARPS` are common choices for
kernels of this kind, 32 numbers per thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from coldstill.trainer.targets import SparseTargets

from .row_passes import RowGradient, RowReadings

BLOCK = 8192
WARPS = 8
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


# The most draws of a position change from batch to batch.
@triton.jit(do_not_specialize=["most_draws"])
def _read_rows(  # type: ignore[no-untyped-def]
    logits,
    ids,
    draws,
    labels,
    of_kept,
    of_draws,
    of_label,
    tail_max,
    tail_sum,
    vocabulary,
    stride,
    top_k,
    most_draws,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 64 bits: M * V passes 2^31 with 15,000 positions of a vocabulary of 150,000.
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * stride
    k, n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    kept = tl.load(ids + row * top_k + k, mask=k < top_k, other=0)
    drawn = tl.load(draws + row * most_draws + n, mask=n < most_draws, other=0)
    tl.store(of_kept + row * top_k + k, tl.load(z + kept, mask=k < top_k, other=0.0), mask=k < top_k)
    tl.store(of_draws + row * most_draws + n, tl.load(z + drawn, mask=n < most_draws, other=0.0), mask=n < most_draws)
    tl.store(of_label + row, tl.load(z + tl.load(labels + row)))

    # All threads of the program have read before one writes, and written before one reads again.
    tl.debug_barrier()
    tl.store(z + kept, float("-inf"), mask=k < top_k)
    tl.debug_barrier()

    # -inf - -inf is not a number.
    top = LOWEST
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        part = tl.load(z + v, mask=v < vocabulary, other=float("-inf"))
        higher = tl.maximum(top, tl.max(part, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(part - higher), 0)
        top = higher
    tl.store(tail_max + row, top)
    tl.store(tail_sum + row, total)


@triton.jit(do_not_specialize=["most_draws"])
def _write_rows(  # type: ignore[no-untyped-def]
    logits,
    ids,
    draws,
    labels,
    tail_max,
    of_tail,
    at_kept,
    at_draws,
    at_label,
    vocabulary,
    stride,
    top_k,
    most_draws,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * stride
    shift, factor = tl.load(tail_max + row), tl.load(of_tail + row)
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        part = tl.load(z + v, mask=v < vocabulary, other=float("-inf"))
        tl.store(z + v, tl.exp(part - shift) * factor, mask=v < vocabulary)
    tl.debug_barrier()

    # Atomic, for ids repeat: among the draws, and the label may be a kept id or a draw.
    k, n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    kept = tl.load(ids + row * top_k + k, mask=k < top_k, other=0)
    by_kept = tl.load(at_kept + row * top_k + k, mask=k < top_k, other=0.0)
    tl.atomic_add(z + kept, by_kept, mask=(k < top_k) & (by_kept != 0), sem="relaxed")
    drawn = tl.load(draws + row * most_draws + n, mask=n < most_draws, other=0)
    by_draws = tl.load(at_draws + row * most_draws + n, mask=n < most_draws, other=0.0)
    tl.atomic_add(z + drawn, by_draws, mask=(n < most_draws) & (by_draws != 0), sem="relaxed")
    tl.atomic_add(z + tl.load(labels + row), tl.load(at_label + row), sem="relaxed")


class TritonPasses:
    """For float32 logits on a GPU; `read_` leaves the logits with -inf at the kept ids."""

    def read_(self, logits: torch.Tensor, targets: SparseTargets) -> RowReadings:
        """Read the logits."""
        positions = len(logits)
        read = RowReadings(
            of_kept=logits.new_empty(targets.ids.shape),
            of_draws=logits.new_empty(targets.draws.shape),
            of_label=logits.new_empty(positions),
            tail_max=logits.new_empty(positions),
            tail_sum=logits.new_empty(positions),
        )
        _launch(_read_rows, logits, targets, *vars(read).values())
        return read

    def write_(
        self, logits: torch.Tensor, targets: SparseTargets, readings: RowReadings, gradient: RowGradient
    ) -> torch.Tensor:
        """Write the gradient."""
        _launch(_write_rows, logits, targets, readings.tail_max, *(it.contiguous() for it in vars(gradient).values()))
        return logits


def _launch(kernel: triton.JITFunction, logits: torch.Tensor, targets: SparseTargets, *per_row: torch.Tensor) -> None:
    positions, vocabulary = logits.shape
    if positions == 0:
        return
    top_k, most_draws = targets.ids.shape[1], targets.draws.shape[1]
    with torch.cuda.device_of(logits):
        kernel[(positions,)](
            logits,
            targets.ids.contiguous(),
            targets.draws.contiguous(),
            targets.labels.contiguous(),
            *per_row,
            vocabulary,
            logits.stride(0),
            top_k,
            most_draws,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
            BLOCK_K=triton.next_power_of_2(max(1, top_k)),
            BLOCK_N=triton.next_power_of_2(max(1, most_draws)),
            num_warps=WARPS,
        )
