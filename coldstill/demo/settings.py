"""How big the demo is and where its files lie. Nothing heavy: the driver, every stage and the tests import this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOSSES = ("cross_entropy", "forward_kl", "taid")
"""The three runs, in the order in which they are shown: the yardstick first."""

MAX_TOKENS = 512
"""Context of both models, and the longest row of the capture."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama model. Heads are 32 wide at the least: vLLM's CPU attention knows no smaller ones."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    seed: int


TEACHER = Shape(width=256, layers=4, heads=4, feed_forward=768, seed=0)
STUDENT = Shape(width=96, layers=4, heads=3, feed_forward=256, seed=1)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is read and learned. Rows are pairs; tokens are those of one optimizer step times its steps."""

    teacher_tokens: int
    student_tokens: int
    distill_rows: int
    held_out_rows: int
    rows_per_unit: int
    top_k: int
    """K. A teacher this small is flat: 44 % of its mass lies outside its top 16. K = 16 with 64 draws keeps .94 of what
    dense distributions give; without draws K = 32 does worse than plain fine-tuning (benchmarks/quality.py)."""
    draws: int
    """D."""
    epochs: float
    batch_size: int
    learning_rate: float
    logging_steps: int
    save_steps: int

    def as_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self)


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


@dataclass(frozen=True)
class Layout:
    """Names below the output folder. Each is the final name of what one stage makes: there means done."""

    root: Path

    @property
    def size(self) -> Path:
        """Which size this folder was begun with."""
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
        """The one student that all three runs start from."""
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
        """What `coldstill verify` said; only kept where it found nothing."""
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
        """Everything that a stage's command said."""
        return self.root / "logs" / f"{stage}.txt"

    def rows(self, part: str, view: str) -> Path:
        """A JSONL file of the text."""
        return self.text / f"{part}.{view}.jsonl"

    def train_config(self, loss: str) -> Path:
        return self.root / "configs" / f"train_{loss}.yaml"

    def run(self, loss: str) -> Path:
        return self.root / "runs" / loss

    def witness(self, loss: str) -> Path:
        """Whether the teacher's folder was there when a run began and when it had ended."""
        return self.root / "runs" / f"{loss}.witness.json"

    def train_summary(self, loss: str) -> Path:
        """Written last by the trainer."""
        return self.run(loss) / "train_summary.json"
