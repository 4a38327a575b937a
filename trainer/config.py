"""What a training run can be told: a YAML mapping comes in, a checked `TrainConfig` goes out.

Only pydantic is imported here, so that `--help` is quick. Unknown keys are errors.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from coldstill.common.models import FrozenModel

from .losses import LossConfig
from .losses.taid import Taid


class LoraConfig(FrozenModel):
    """Low-rank adapters instead of all weights (arXiv 2106.09685), by peft."""

    r: int = Field(16, ge=1, description="Rank of the adapters: their size, and what they can learn.")
    alpha: int = Field(32, ge=1, description="Adapters are scaled by alpha / r; twice r is a usual choice.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before each adapter while training.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Layers that get an adapter: all-linear (all but the head), or names of modules."
    )
    merge: bool = Field(
        False,
        description="Add the adapters to the weights at the end: student/ is then a plain model, adapter/ holds them.",
    )


class StudentConfig(FrozenModel):
    """Which model learns."""

    model: str | None = Field(
        None, description="Folder or hub name of the student: a causal language model of transformers."
    )
    from_scratch: str | dict[str, Any] | None = Field(
        None,
        description="In place of model, for random weights and the dataset's tokenizer: a folder or hub name whose "
        "config.json is taken, or its content, such as {model_type: llama, hidden_size: 512}.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Arithmetic of the student; bfloat16 is mixed precision, about twice as fast on a GPU."
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the weights while training; bfloat16 halves their memory and loses small updates, which "
        "with lora only touches the frozen ones.",
    )
    attention: str | None = Field(
        None,
        description="Attention of transformers, such as sdpa or flash_attention_2; left out, transformers chooses.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters; left out, all weights learn.")

    @model_validator(mode="after")
    def _one_origin(self) -> StudentConfig:
        if (self.model is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of model and from_scratch")
        if self.from_scratch is not None and self.lora is not None:
            raise ValueError("lora adapts a trained model; from_scratch has none")
        if isinstance(self.from_scratch, dict) and "model_type" not in self.from_scratch:
            raise ValueError("from_scratch needs a model_type, such as llama")
        return self

    @property
    def name(self) -> str:
        """What the student is called in messages and on its card."""
        if self.model is not None:
            return self.model
        if isinstance(self.from_scratch, dict):
            return f"{self.from_scratch['model_type']} from scratch"
        return f"{self.from_scratch} from scratch"


class DataConfig(FrozenModel):
    """Which rows come, in which order, and how much of what the teacher said of them."""

    seed: int = Field(
        0,
        ge=0,
        lt=1 << 63,
        description="Seed of the order of shards, row groups and rows, which changes from epoch to epoch, and of which "
        "draws stay.",
    )
    weights: list[float] | None = Field(
        None, description="Shares of the rows from each of several datasets; left out, in proportion to their rows."
    )
    top_k: int | None = Field(
        None, ge=1, description="Use this many kept ids of a position; the others join the tail. Left out, all."
    )
    draws: int | None = Field(
        None, ge=0, description="Use this many tail draws, counted as the capture counted them. Left out, all."
    )
    cache_dir: str | None = Field(
        None,
        description="Local folder for copies of remote shards; left out, $COLDSTILL_CACHE/shards or "
        "~/.cache/coldstill/shards.",
    )
    cache_bytes: int = Field(
        32 << 30, ge=1, description="Most bytes of copies there; those that were not used for longest go first."
    )


class TrainingConfig(FrozenModel):
    """How the optimizer moves. AdamW; defaults of the TAID repository where it has them."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of the optimizer.")
    epochs: float = Field(1.0, gt=0, description="Passes over the dataset; ignored where max_steps is given.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; ends the run in the middle of an epoch if need be."
    )
    batch_size: int = Field(8, ge=1, description="Rows, or packs of rows, of one forward pass on one device.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Forward passes whose targets share one optimizer step."
    )
    pack_length: int | None = Field(
        None,
        ge=2,
        description="Tokens of a pack: rows are joined to this length, without attention between them; null pads each "
        "row of a batch to the longest.",
    )
    optimizer: str = Field(
        "adamw_torch_fused",
        description="Optimizer by its name in transformers, such as adamw_torch, adamw_8bit or adafactor.",
    )
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of the run in which the learning rate rises from 0."
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    weight_decay: float = Field(0.01, ge=0, description="The optimizer's weight decay; not on biases and norms.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them alone.")
    logging_steps: int = Field(10, ge=1, description="A line of the log every so many optimizer steps.")
    save_steps: int = Field(
        200, ge=1, description="A checkpoint every so many optimizer steps; a killed run goes on from it."
    )
    eval_steps: int = Field(
        200, ge=1, description="A measurement on eval_dataset, where there is one, every so many optimizer steps."
    )
    best_metric: str | None = Field(
        None,
        description="The finished student is the checkpoint where this measurement was lowest, such as "
        "eval_cross_entropy, and there is a checkpoint at each measurement; left out, it is the last one.",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after so many measurements in a row without a better best_metric."
    )
    dataloader_workers: int = Field(
        1, ge=0, description="Processes that read and decode rows; the order of rows does not depend on them."
    )
    seed: int = Field(42, ge=0, description="Seed of everything but the order of the rows, for instance dropout.")
    report_to: str = Field("none", description="Where transformers sends the log: none, tensorboard, wandb, trackio.")
    push_to_hub: str | None = Field(
        None, description="Hub repository that gets the finished student and its card; left out, none does."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; left out, torch chooses.")

    @model_validator(mode="after")
    def _patience_has_a_metric(self) -> TrainingConfig:
        if self.early_stopping_patience is not None and self.best_metric is None:
            raise ValueError("early_stopping_patience needs best_metric: the measurement that must fall")
        return self


class TrainConfig(FrozenModel):
    """A whole training run."""

    dataset: str | list[str] = Field(description="Path or URL of a sealed dataset directory, or several of them.")
    output: str = Field(description="Local folder for checkpoints, the finished student and the summary.")
    student: StudentConfig = Field(description="Which model learns.")
    eval_dataset: str | None = Field(
        None, description="Path or URL of a sealed dataset of held-out rows, to measure the student on meanwhile."
    )
    loss: LossConfig = Field(default_factory=Taid, description="What it learns from the cache.")
    data: DataConfig = Field(default_factory=DataConfig, description="In which order the rows come.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the optimizer moves.")

    @model_validator(mode="after")
    def _best_has_a_dataset(self) -> TrainConfig:
        if self.training.best_metric is not None and self.eval_dataset is None:
            raise ValueError("training.best_metric needs eval_dataset")
        return self
