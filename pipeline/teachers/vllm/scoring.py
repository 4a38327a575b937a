"""A step's hidden states to the targets of the requests in it. Torch, and no vLLM: the head is a function.

Wanted rows of all requests are put together first, then cut into blocks: short rows of many sequences fill one matrix
product, a position without a target costs nothing, and memory is bounded at any vocabulary size.
Shape letters: `N` wanted positions of a step, `H` rows of hidden states, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coldstill.pipeline.teachers.kernel import Kernel, Summary

from .requests import Arrays, TappedRequest, TapSettings

_LEAST_ROWS, _MOST_ROWS = 16, 4096


class Piece(NamedTuple):
    """Positions `part` of a request's wanted ones, whose hidden states stand at `rows int64` and whose next tokens are
    `labels int64`."""

    request: TappedRequest
    part: slice
    rows: np.ndarray
    labels: np.ndarray


class _Pending(NamedTuple):
    """A step's results on their way to the host: usable once `arrived` is."""

    pieces: Sequence[Piece]
    summary: Summary
    labels: np.ndarray
    arrived: torch.cuda.Event | None


class StepScorer:
    """Scores the pieces of one step after the other."""

    def __init__(self, settings: TapSettings, *, vocab_size: int, block_bytes: int, keeps: bool, is_split: bool):
        """`block_bytes`: the most memory for the logits of a block and what is made of them. `keeps`: whether this
        process keeps what it computes. `is_split`: whether the head is split over several processes: all of them must
        make the same calls of it then, and one keeps the result."""
        self._settings, self._keeps, self._is_split = settings, keeps, is_split
        # Logits in the head's type and what the kernel makes of them: 8 bytes an entry.
        self._block = min(_MOST_ROWS, max(_LEAST_ROWS, block_bytes // (8 * vocab_size)))
        self._kernel = Kernel(
            top_k=settings.top_k,
            min_prob=settings.min_prob,
            kept_draws=min(settings.kept_draws, settings.draws),
            token_count=settings.token_count,
        )
        self._pending: list[_Pending] = []

    def score(self, pieces: Sequence[Piece], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Score a step: `hidden [H, width]`, `head` from hidden states `[n, width]` to logits `[n, V]`.

        What goes wrong in the kernel is a failure of the step's requests, and the calls of the head go on: other
        processes wait in it for this one.
        """
        self.settle()
        pieces = [piece for piece in pieces if piece.labels.size]
        if not pieces:
            return
        rows = torch.from_numpy(np.concatenate([piece.rows for piece in pieces])).to(hidden.device, non_blocking=True)
        labels = np.concatenate([piece.labels for piece in pieces])
        uniforms = np.concatenate([piece.request.uniforms(piece.part) for piece in pieces])
        parts: list[Summary] = []
        failure = ""
        start = 0
        while start < len(labels):
            block = slice(start, start + self._block)
            try:
                logits = head(hidden[rows[block]])
                start = block.stop
                if self._keeps and not failure:
                    parts.append(self._summary(logits, labels[block], uniforms[block]))
            except torch.OutOfMemoryError as error:
                start = block.start if self._smaller() else block.stop
                failure = failure if start == block.start else f"{type(error).__name__}: {error}"
            except Exception as error:  # must not leave the hook: it would end the engine and all that is in it
                start, failure = block.stop, f"{type(error).__name__}: {error}"
        if failure:
            for piece in pieces:
                piece.request.fail(failure)
        elif self._keeps:
            self._send(pieces, Summary(*map(torch.cat, zip(*parts, strict=True))), labels)

    def settle(self) -> None:
        """Store what has been computed in its requests; waits for a device that is still at it."""
        pending, self._pending = self._pending, []
        for step in pending:
            if step.arrived is not None:
                step.arrived.synchronize()
            values = {name: tensor.numpy() for name, tensor in step.summary._asdict().items()}
            finite, beyond = values.pop("finite"), values.pop("beyond")
            if not self._settings.draw_logprobs:
                values["draw_logprobs"] = values["draw_logprobs"][:, :0]
            arrays, start = Arrays(**values, labels=step.labels), 0
            for piece in step.pieces:
                stop = start + piece.labels.size
                piece.request.store(piece.part, arrays, slice(start, stop), finite=finite, beyond=beyond)
                start = stop

    def _summary(self, logits: Tensor, labels: np.ndarray, uniforms: np.ndarray) -> Summary:
        return self._kernel(
            logits,
            torch.from_numpy(labels).to(logits.device, non_blocking=True),
            torch.from_numpy(uniforms).to(logits.device, non_blocking=True),
        )

    def _smaller(self) -> bool:
        """Halve the blocks from now on, where that can be: processes that share a head would part ways."""
        if self._is_split or self._block <= _LEAST_ROWS:
            return False
        self._block //= 2
        torch.cuda.empty_cache()
        return True

    def _send(self, pieces: Sequence[Piece], summary: Summary, labels: np.ndarray) -> None:
        """Start the copy to the host; nothing waits for it before the next step."""
        arrived = None
        if summary.ids.device.type == "cuda":
            summary = Summary(*(_to_pinned(tensor) for tensor in summary))
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(pieces, summary, labels, arrived))


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
