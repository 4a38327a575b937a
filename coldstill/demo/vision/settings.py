"""The vision demo's sizes, file names, and settings for `coldstill capture` and `coldstill train`.

Imports no heavy library, because the driver, every stage and the tests import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldstill.demo.settings import DemoSize
from coldstill.demo.settings import Layout as TextLayout

MAX_TOKENS = 64
"""Context of both models, and the length of the longest row of the capture, with its images expanded."""


DISTILL_SEED, HELD_OUT_SEED = 0, 1
"""Seeds of the chats. Sizes and rates were chosen on held-out chats of seed 0, results are on those of seed 1."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of an Idefics3 model. Heads are 32 wide: vLLM's attention on a CPU supports no smaller ones.

    An image becomes (`SIDE` / `patch` / `merged`)^2 tokens: `merged` x `merged` patches are joined to one.
    """

    width: int
    layers: int
    feed_forward: int
    vision_width: int
    vision_layers: int
    vision_feed_forward: int
    patch: int
    merged: int
    seed: int


TEACHER = Shape(
    width=128,
    layers=3,
    feed_forward=384,
    vision_width=128,
    vision_layers=3,
    vision_feed_forward=256,
    patch=8,
    merged=4,
    seed=0,
)
"""4 tokens for an image. 16 (`merged` 2) would make each row longer, and each step slower."""
STUDENT = Shape(
    width=64,
    layers=2,
    feed_forward=128,
    vision_width=64,
    vision_layers=2,
    vision_feed_forward=128,
    patch=8,
    merged=2,
    seed=1,
)
"""16 tokens for an image: the rows are stored with one placeholder for each, so the student's number is its own."""


@dataclass(frozen=True, kw_only=True)
class Size(DemoSize):
    """Rows are chats of one question."""

    teacher_steps: int
    student_steps: int

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values, with a mark that tells them from those of the text demo."""
        return {"vision": True, **super().as_dict()}


FULL = Size(
    teacher_steps=1_000,
    student_steps=700,
    distill_rows=6_144,
    held_out_rows=768,
    rows_per_unit=512,
    top_k=16,
    draws=16,
    epochs=5.0,
    batch_size=32,
    learning_rate=2e-3,
    logging_steps=4,
    save_steps=128,
)

QUICK = Size(
    teacher_steps=120,
    student_steps=150,
    distill_rows=384,
    held_out_rows=128,
    rows_per_unit=96,
    top_k=16,
    draws=16,
    epochs=2.0,
    batch_size=32,
    learning_rate=2e-3,
    logging_steps=2,
    save_steps=128,
)


def size_of(*, quick: bool) -> Size:
    """`QUICK` or `FULL`."""
    return QUICK if quick else FULL


@dataclass(frozen=True)
class Layout(TextLayout):
    """Paths below the output folder, named as those of the text demo."""

    @property
    def text(self) -> Path:
        """Chats and the images that they name."""
        return self.root / "chats"

    def chats(self, part: str) -> Path:
        """A JSONL file of chats; their images are in a folder beside it."""
        return self.text / f"{part}.jsonl"

    @property
    def picture(self) -> Path:
        return self.root / "answers.png"

    @property
    def answers(self) -> Path:
        """The models' answers to the held-out questions."""
        return self.root / "answers.json"


def capture_config(layout: Layout, size: Size) -> dict[str, Any]:
    """Settings that score the distillation part's chats with the teacher under vLLM."""
    return {
        "output": str(layout.dataset),
        "source": {"path": str(layout.chats("distill")), "loss_on": "assistant"},
        "teacher": {
            "model": str(layout.teacher),
            "engine": "vllm",
            "dtype": "float32",
            "top_k": size.top_k,
            "draws": size.draws,
            "max_length": MAX_TOKENS,
            "max_images": 2,
        },
        "rows_per_unit": size.rows_per_unit,
        "cluster": {"max_workers": 1},
    }
