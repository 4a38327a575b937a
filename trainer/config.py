"""What a training run can be told: a YAML mapping comes in, a checked `TrainConfig` goes out.

Only pydantic is imported here, so that `--help` is quick. Unknown keys are errors.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudentConfig(_Section):
    """Which model learns."""

    model: str = Field(description="Folder or hub name of the student: a causal language model of transformers.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Arithmetic of the student; bfloat16 is mixed precision: weights and optimizer stay float32.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )


class LossConfig(_Section):
    """What the student learns from the cache. Defaults of TAID: arXiv 2501.16937, Phi-3-mini to TinyLlama."""

    name: Literal["taid", "forward_kl", "cross_entropy"] = Field(
        "taid", description="taid, forward_kl (taid held at t = 1) or cross_entropy (plain fine-tuning, no teacher)."
    )
    schedule: Literal["adaptive", "linear"] = Field(
        "adaptive", description="How taid moves t: the paper's adaptive rule, or the straight line alone."
    )
    t_start: float = Field(
        0.4, ge=0, le=1, description="t of the first step; the paper uses 0.2 to 0.4, more for a larger gap."
    )
    t_end: float = Field(1.0, ge=0, le=1, description="t at the end of the run; 1 is the teacher itself.")
    alpha: Literal["auto"] | float = Field(
        "auto", description="Speed of the adaptive rule; auto keeps the paper's curve at any number of steps."
    )
    beta: float = Field(0.99, ge=0, lt=1, description="Memory of the adaptive rule's momentum.")
    cross_entropy_share: float = Field(
        0.0, ge=0, le=1, description="Weight s of the labels' cross-entropy: (1 - s) loss + s cross-entropy."
    )
    tail: Literal["auto", "mixture", "bucket"] = Field(
        "auto",
        description="Tail outside the top K: mixture uses the cached draws, bucket its mass alone; auto as cached.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> LossConfig:
        if self.t_start > self.t_end:
            raise ValueError(f"t_start ({self.t_start}) must not be above t_end ({self.t_end})")
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be auto or a number from 0 to 1, not {self.alpha}")
        return self


class DataConfig(_Section):
    """In which order the rows come."""

    seed: int = Field(
        0, ge=0, description="Seed of the order of shards and of the rows inside them; epoch by epoch another."
    )


class TrainingConfig(_Section):
    """How the optimizer moves. AdamW; defaults of the TAID repository where it has them."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    epochs: float = Field(1.0, gt=0, description="Passes over the dataset; ignored where max_steps is given.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; ends the run in the middle of an epoch if need be."
    )
    batch_size: int = Field(8, ge=1, description="Rows of one forward pass on one device.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Forward passes whose targets share one optimizer step."
    )
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of the run in which the learning rate rises from 0."
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay; not on biases and norms.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them alone.")
    logging_steps: int = Field(10, ge=1, description="A line of the log every so many optimizer steps.")
    save_steps: int = Field(
        200, ge=1, description="A checkpoint every so many optimizer steps; a killed run goes on from it."
    )
    seed: int = Field(42, ge=0, description="Seed of everything but the order of the rows, for instance dropout.")
    report_to: str = Field("none", description="Where transformers sends the log: none, tensorboard, wandb, trackio.")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; left out, torch chooses.")


class TrainConfig(_Section):
    """A whole training run."""

    dataset: str = Field(description="Path or URL of a sealed dataset directory.")
    output: str = Field(description="Local folder for checkpoints, the finished student and the summary.")
    student: StudentConfig = Field(description="Which model learns.")
    loss: LossConfig = Field(default_factory=LossConfig, description="What it learns from the cache.")
    data: DataConfig = Field(default_factory=DataConfig, description="In which order the rows come.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the optimizer moves.")
