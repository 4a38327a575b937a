"""Scores a step's hidden states and keeps the targets of each request.

Torch, and no vLLM: the head is a function. The wanted rows of all requests of a step are joined first, then cut into
blocks: short rows of many sequences fill one matrix product, a position without a target costs nothing, and memory is
bounded at any vocabulary size. Positions are absolute, so the chunks of a prompt may have any borders, and positions
that are computed again after a preemption are written again.

Shape letters: `N` wanted positions of a step or request, `H` rows of hidden states, `V` vocabulary, `K` teacher top-k,
`D` draws, `R` most kept draws of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from coldstill.pipeline.score_ids import UNUSED, rows_at
from coldstill.pipeline.teachers.target_extractor import (
    Summary,
    TargetExtractor,
    draw_uniforms,
    named_on,
    systematic_draws,
    uniform_count,
)
from coldstill.storage_schema.rows import TeacherTargets

_LEAST_ROWS, _MOST_ROWS = 16, 4096

NEGLIGIBLE_NATS = 50.0
"""Logits further below their row's best have no mass, and may be masks of any size."""

SPEC_KEY = "coldstill"
"""The key of a request's `RequestSpec` in vLLM's `SamplingParams.extra_args`."""


class RequestSpec(TypedDict):
    """The positions of a request that the tap scores; plain values, which vLLM passes on to its worker processes.

    Either `spans`, pairs of the first and one past the last target position, or `max_answer_tokens`: then every
    position from that of the prompt's last token on is a target.

    The engine counts the tokens of images, and a stored row does not: `stored_starts` are the stored positions of the
    first target of each span, or of the answer, where they differ. Draws depend on stored positions only.

    `score_ids`: see `TokenSequence`.
    """

    number: int
    sample_id: str
    score_ids: NotRequired[list[list[int]]]
    spans: NotRequired[list[list[int]]]
    stored_starts: NotRequired[list[int]]
    max_answer_tokens: NotRequired[int]


@dataclass(frozen=True, kw_only=True)
class TapSettings:
    """What is kept of each distribution; plain values, which are sent to vLLM's worker processes."""

    top_k: int
    named_width: int = 0
    """Room for ids that the source names, beside K."""
    min_prob: float
    draws: int
    kept_draws: int
    draw_method: str = "iid"
    draw_logprobs: bool
    draw_seed: int
    token_count: int
    is_self_check: bool = False
    """Whether to record what the self-check's limits depend on."""

    def row_bytes(self) -> int:
        """Bytes of one position in a message to the engine's process, at most."""
        return 8 * (self.top_k + self.named_width) + 8 * self.kept_draws + 24


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """A `Summary` on the host, and the labels that it was made with."""

    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    log_tail: np.ndarray
    label_logprob: np.ndarray
    draw_ids: np.ndarray
    draw_logprobs: np.ndarray
    draw_counts: np.ndarray
    labels: np.ndarray

    @classmethod
    def empty(cls, positions: int, settings: TapSettings) -> Arrays:
        """Arrays for `positions` distributions, not filled."""
        return cls(**{name: np.empty((positions, *shape), dtype) for name, shape, dtype in _layout(settings)})

    def to_wire(self, positions: int) -> list[bytes]:
        """The bytes of the first `positions` of each array."""
        return [getattr(self, field.name)[:positions].tobytes() for field in fields(self)]

    @classmethod
    def from_wire(cls, parts: Sequence[bytes], *, positions: int, settings: TapSettings) -> Arrays:
        """Read-only arrays from the result of `to_wire`."""
        return cls(
            **{
                name: np.frombuffer(part, dtype).reshape(positions, *shape)
                for (name, shape, dtype), part in zip(_layout(settings), parts, strict=True)
            }
        )

    def targets(self, *, draw_logprobs: bool) -> TeacherTargets:
        """The same as `TeacherTargets`."""
        drawn = np.arange(self.draw_ids.shape[1]) < self.draw_counts[:, None]
        return TeacherTargets(
            ids=self.ids,
            logprobs=self.logprobs,
            counts=self.counts,
            log_tail=self.log_tail,
            label_logprob=self.label_logprob,
            draw_ids=self.draw_ids[drawn],
            draw_counts=self.draw_counts,
            draw_logprobs=self.draw_logprobs[drawn] if draw_logprobs else None,
        )


def _layout(settings: TapSettings) -> list[tuple[str, tuple[int, ...], type]]:
    kept_draws, width = min(settings.kept_draws, settings.draws), settings.top_k + settings.named_width
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "ids": ((width,), np.int32),
        "logprobs": ((width,), np.float32),
        "counts": ((), np.int32),
        "log_tail": ((), np.float32),
        "label_logprob": ((), np.float32),
        "draw_ids": ((kept_draws,), np.int32),
        "draw_logprobs": ((kept_draws if settings.draw_logprobs else 0,), np.float32),
        "draw_counts": ((), np.int32),
        "labels": ((), np.int32),
    }
    return [(field.name, *shapes[field.name]) for field in fields(Arrays)]


class TappedRequest:
    """One request: its wanted positions, ascending, and the targets computed so far."""

    def __init__(self, spec: RequestSpec, *, prompt: Sequence[int], settings: TapSettings):
        self.prompt = np.asarray(prompt, np.int64)
        if "max_answer_tokens" in spec:
            first = self.prompt.size - 1
            spans = [[first, first + spec["max_answer_tokens"]]]
        else:
            spans = spec["spans"]
        self.positions = _joined([np.arange(a, b) for a, b in spans])
        starts = spec.get("stored_starts", [start for start, _ in spans])
        stored = _joined([start + np.arange(b - a) for start, (a, b) in zip(starts, spans, strict=True)])
        self.arrays = Arrays.empty(self.positions.size, settings)
        self.done = np.zeros(self.positions.size, bool)
        self.finite = np.ones(self.positions.size, bool)
        self.failure = ""
        self.recomputed = 0
        self.padding_mass = 0.0
        self._named = np.array(spec["score_ids"], np.int64) if "score_ids" in spec else None
        self._uniforms = draw_uniforms(
            stored,
            draws=uniform_count(settings.draws, draw_method=settings.draw_method),
            seed=settings.draw_seed,
            sample_id=spec["sample_id"],
        )

    def wanted(self, start: int, stop: int) -> slice:
        """The part of the wanted positions that lies in `[start, stop)`."""
        return slice(*np.searchsorted(self.positions, (start, stop)).tolist())

    def labels(self, part: slice, answer: Sequence[int] = ()) -> np.ndarray:
        """`int64 [n]`: the tokens that follow these positions, in the prompt and in the answer so far."""
        following = self.positions[part] + 1
        inside = following < self.prompt.size
        labels = self.prompt[np.where(inside, following, 0)]
        for index in np.flatnonzero(~inside):
            labels[index] = answer[following[index] - self.prompt.size]
        return labels

    def uniforms(self, part: slice) -> np.ndarray:
        """`float64 [n, D]` of these positions."""
        return self._uniforms[part]

    def named(self, part: slice) -> np.ndarray | None:
        """`int64 [n, M]`: the ids that the source names at these positions, -1 where fewer; None if it names none."""
        return None if self._named is None else rows_at(self._named, part, self.positions.size)

    def store(self, part: slice, arrays: Arrays, rows: slice, *, finite: np.ndarray, padding_mass: np.ndarray) -> None:
        """Copy `rows` of a step's arrays to these positions."""
        self.finite[part] = finite[rows]
        for field in fields(Arrays):
            getattr(self.arrays, field.name)[part] = getattr(arrays, field.name)[rows]
        self.recomputed += int(self.done[part].sum())
        self.done[part] = True
        self.padding_mass += float(padding_mass[rows].sum())

    def fail(self, reason: str) -> None:
        """Record a failure of this request; the first one stays."""
        self.failure = self.failure or reason

    def is_finite(self, positions: int) -> bool:
        """Whether none of the first `positions` has a NaN or infinite logit."""
        return bool(self.finite[:positions].all())

    def problem(self, positions: int) -> str:
        """The problem of the first `positions`, as text; empty if all of them were computed."""
        if self.failure:
            return self.failure
        if positions > self.positions.size:
            return f"{positions} targets, at most {self.positions.size} were requested"
        if not self.done[:positions].all():
            missing = self.positions[:positions][~self.done[:positions]]
            return f"{missing.size} of {positions} positions were never computed, the first is {missing[0]}"
        return ""


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])


class Piece(NamedTuple):
    """Part of a request's wanted positions: the rows of their hidden states, `rows int64 [n]`, and their next tokens,
    `labels int64 [n]`."""

    request: TappedRequest
    part: slice
    rows: np.ndarray
    labels: np.ndarray


class _Pending(NamedTuple):
    """Results of a step that are being copied to the host; complete once `arrived` has happened."""

    pieces: Sequence[Piece]
    summary: Summary
    labels: np.ndarray
    arrived: torch.cuda.Event | None


class StepScorer:
    """Scores steps, one after the other."""

    def __init__(self, settings: TapSettings, *, vocab_size: int, block_bytes: int, keeps: bool, is_split: bool):
        """`block_bytes`: the maximum memory for the logits of a block and what is computed from them. `keeps`: whether
        this process keeps its results. `is_split`: whether the head is split over several processes; all of them must
        then make the same calls of it, and one keeps the results."""
        self._settings, self._keeps, self._is_split = settings, keeps, is_split
        # Logits in the head's type and the extractor's work memory: 8 bytes an entry.
        self._block = min(_MOST_ROWS, max(_LEAST_ROWS, block_bytes // (8 * vocab_size)))
        self._extract = TargetExtractor(
            top_k=settings.top_k,
            min_prob=settings.min_prob,
            kept_draws=min(settings.kept_draws, settings.draws),
            token_count=settings.token_count,
            named_width=settings.named_width,
            systematic_draws=systematic_draws(settings.draws, draw_method=settings.draw_method),
        )
        self._pending: list[_Pending] = []
        self.largest_logit, self.width = 0.0, 0
        """For the self-check: of the logits that are not negligible, and of the hidden states."""

    def score(self, pieces: Sequence[Piece], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Score a step: `hidden [H, width]`, `head` from hidden states `[n, width]` to logits `[n, V]`.

        An exception in the extractor is recorded as a failure of the step's requests, and the head is still called for
        the other blocks: other processes wait in it for this one.
        """
        self.settle()
        pieces = [piece for piece in pieces if piece.labels.size]
        if not pieces:
            return
        rows = torch.from_numpy(np.concatenate([piece.rows for piece in pieces])).to(hidden.device, non_blocking=True)
        labels = np.concatenate([piece.labels for piece in pieces])
        uniforms = np.concatenate([piece.request.uniforms(piece.part) for piece in pieces])
        named = _joined_names([(piece.request.named(piece.part), piece.labels.size) for piece in pieces])
        parts: list[Summary] = []
        failure = ""
        start = 0
        while start < len(labels):
            block = slice(start, start + self._block)
            try:
                logits = head(hidden[rows[block]])
                start = block.stop
                if self._settings.is_self_check:
                    self.width = hidden.shape[1]
                    self.largest_logit = max(self.largest_logit, _largest(logits))
                if self._keeps and not failure:
                    of_block = None if named is None else named[block]
                    parts.append(self._summary(logits, labels[block], uniforms[block], of_block))
            except torch.OutOfMemoryError as error:
                start = block.start if self._halve_blocks() else block.stop
                failure = failure if start == block.start else f"{type(error).__name__}: {error}"
            except Exception as error:  # raised in the hook, it would end the engine and all requests in it
                start, failure = block.stop, f"{type(error).__name__}: {error}"
        if failure:
            for piece in pieces:
                piece.request.fail(failure)
        elif self._keeps:
            self._send(pieces, Summary(*map(torch.cat, zip(*parts, strict=True))), labels)

    def settle(self) -> None:
        """Store the pending results in their requests; waits for the device if necessary."""
        pending, self._pending = self._pending, []
        for step in pending:
            if step.arrived is not None:
                step.arrived.synchronize()
            values = {name: tensor.numpy() for name, tensor in step.summary._asdict().items()}
            finite, padding_mass = values.pop("finite"), values.pop("padding_mass")
            if not self._settings.draw_logprobs:
                values["draw_logprobs"] = values["draw_logprobs"][:, :0]
            arrays, start = Arrays(**values, labels=step.labels), 0
            for piece in step.pieces:
                stop = start + piece.labels.size
                piece.request.store(piece.part, arrays, slice(start, stop), finite=finite, padding_mass=padding_mass)
                start = stop

    def _summary(self, logits: Tensor, labels: np.ndarray, uniforms: np.ndarray, named: np.ndarray | None) -> Summary:
        return self._extract(
            logits,
            torch.from_numpy(labels).to(logits.device, non_blocking=True),
            torch.from_numpy(uniforms).to(logits.device, non_blocking=True),
            named_on(logits.device, named),
        )

    def _halve_blocks(self) -> bool:
        """Halve the blocks from now on, if possible: processes that share a head must keep equal blocks."""
        if self._is_split or self._block <= _LEAST_ROWS:
            return False
        self._block //= 2
        torch.cuda.empty_cache()
        return True

    def _send(self, pieces: Sequence[Piece], summary: Summary, labels: np.ndarray) -> None:
        """Start the copy to the host; the next step waits for it."""
        arrived = None
        if summary.ids.device.type == "cuda":
            summary = Summary(*(_to_pinned(tensor) for tensor in summary))
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(pieces, summary, labels, arrived))


def _joined_names(parts: Sequence[tuple[np.ndarray | None, int]]) -> np.ndarray | None:
    """`int64 [n, M]` of the pieces' ids `[positions, M]`, of which M may differ; None if no piece has any."""
    width = max((names.shape[1] for names, _ in parts if names is not None), default=0)
    if not width:
        return None
    joined = np.full((sum(size for _, size in parts), width), UNUSED, np.int64)
    start = 0
    for names, size in parts:
        if names is not None:
            joined[start : start + size, : names.shape[1]] = names
        start += size
    return joined


def _largest(logits: Tensor) -> float:
    """The largest size of a finite logit, among those within `NEGLIGIBLE_NATS` of their row's best."""
    values = logits.float().masked_fill(~logits.isfinite(), -torch.inf)
    near = values >= values.amax(-1, keepdim=True) - NEGLIGIBLE_NATS
    return float(values.masked_fill(~(near & values.isfinite()), 0.0).abs().amax())


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
