"""What the tap knows of the requests under way: which positions each wants, and what came of them. No vLLM, no GPU.

Positions are absolute, so that it does not matter in which chunks a prompt is computed, and how often: after a
preemption they come again and are written again. Shape letters: `T` tokens, `N` target positions, `K` teacher top-k,
`D` draws, `R` kept draws of a position at the most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from coldstill.pipeline.teachers.uniforms import draw_uniforms
from coldstill.storage_schema.rows import TeacherTargets

KEY = "coldstill"
"""Where a request says what it wants, in vLLM's `SamplingParams.extra_args`."""


@dataclass(frozen=True, kw_only=True)
class TapSettings:
    """What is kept of each distribution; plain values, because they travel to vLLM's worker processes."""

    top_k: int
    min_prob: float
    draws: int
    kept_draws: int
    draw_logprobs: bool
    draw_seed: int
    token_count: int

    def row_bytes(self) -> int:
        """Of one position, as it travels to the engine's process."""
        return 8 * self.top_k + 8 * self.kept_draws + 24


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """`Summary` of the kernel on the host, and the labels that it was made with."""

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
        """Not filled."""
        return cls(**{name: np.empty((positions, *shape), dtype) for name, shape, dtype in _layout(settings)})

    def to_wire(self, positions: int) -> list[bytes]:
        """The first `positions` of each array."""
        return [getattr(self, field.name)[:positions].tobytes() for field in fields(self)]

    @classmethod
    def from_wire(cls, parts: Sequence[bytes], *, positions: int, settings: TapSettings) -> Arrays:
        """What `to_wire` wrote, read-only."""
        return cls(
            **{
                name: np.frombuffer(part, dtype).reshape(positions, *shape)
                for (name, shape, dtype), part in zip(_layout(settings), parts, strict=True)
            }
        )

    def targets(self, *, draw_logprobs: bool) -> TeacherTargets:
        """The same as a dataset's targets."""
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
    kept_draws = min(settings.kept_draws, settings.draws)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "ids": ((settings.top_k,), np.int32),
        "logprobs": ((settings.top_k,), np.float32),
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
    """One request: its wanted positions, ascending, and what is known of them so far.

    `wish`: `sample_id` and either `spans`, pairs of first and one past the last target position, or `answer`, the most
    tokens that it may generate: then every position from that of the prompt's last token on is a target.
    """

    def __init__(self, wish: Mapping[str, Any], *, prompt: Sequence[int], settings: TapSettings):
        self.prompt = np.asarray(prompt, np.int64)
        if "answer" in wish:
            first = self.prompt.size - 1
            self.positions = np.arange(first, first + int(wish["answer"]))
        else:
            self.positions = np.concatenate([np.arange(a, b) for a, b in wish["spans"]] or [np.empty(0, np.int64)])
        self.arrays = Arrays.empty(self.positions.size, settings)
        self.done = np.zeros(self.positions.size, bool)
        self.failure = ""
        self.again = 0
        self.beyond = 0.0
        self._uniforms = draw_uniforms(
            self.positions, draws=settings.draws, seed=settings.draw_seed, sample_id=str(wish["sample_id"])
        )

    def wanted(self, start: int, stop: int) -> slice:
        """Which of the wanted positions lie in `[start, stop)`."""
        return slice(*np.searchsorted(self.positions, (start, stop)).tolist())

    def labels(self, part: slice, answer: Sequence[int] = ()) -> np.ndarray:
        """`int64 [n]`: the tokens that follow these positions, of the prompt and of the answer so far."""
        following = self.positions[part] + 1
        inside = following < self.prompt.size
        labels = self.prompt[np.where(inside, following, 0)]
        for index in np.flatnonzero(~inside):
            labels[index] = answer[following[index] - self.prompt.size]
        return labels

    def uniforms(self, part: slice) -> np.ndarray:
        """`float64 [n, D]` of these positions."""
        return self._uniforms[part]

    def store(self, part: slice, arrays: Arrays, rows: slice, *, finite: np.ndarray, beyond: np.ndarray) -> None:
        """Keep rows of a step's arrays for these positions."""
        if not finite[rows].all():
            position = self.positions[part][int(finite[rows].argmin())]
            self.fail(f"a logit at position {position} is not a number")
            return
        for field in fields(Arrays):
            getattr(self.arrays, field.name)[part] = getattr(arrays, field.name)[rows]
        self.again += int(self.done[part].sum())
        self.done[part] = True
        self.beyond += float(beyond[rows].sum())

    def fail(self, reason: str) -> None:
        """Remember the first thing that went wrong with this request."""
        self.failure = self.failure or reason

    def problem(self, positions: int) -> str:
        """What is wrong with the first `positions`: nothing, where all of them were computed."""
        if self.failure:
            return self.failure
        if positions > self.positions.size:
            return f"{positions} targets where at most {self.positions.size} were announced"
        if not self.done[:positions].all():
            missing = self.positions[:positions][~self.done[:positions]]
            return f"{missing.size} of {positions} positions were never computed, the first is {missing[0]}"
        return ""
