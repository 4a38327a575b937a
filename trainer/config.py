"""The settings of a training run. Unknown keys are errors.

This module imports no heavy library, so that `coldstill train --help` is quick.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from coldstill.common.models import FrozenModel, KeysClash

from .losses import LossConfig
from .losses.taid import Taid

FROM_SCRATCH = " from scratch"
"""The end of the name of a student with random weights, in messages."""


class LoraConfig(FrozenModel):
    """LoRA: train low-rank adapters instead of all weights (arXiv 2106.09685), by peft."""

    r: int = Field(16, ge=1, description="Rank of the adapters; a higher rank adds parameters and capacity.")
    alpha: int = Field(
        32, ge=1, description="Scale of the adapters, which are multiplied by alpha / r; twice r is common."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability before each adapter during training.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Layers with an adapter: all-linear (all but the head), or module names such as q_proj.",
    )
    merge: bool = Field(
        False,
        description="Merge the adapters into the weights at the end; student/ is then a plain model.",
    )


class StudentConfig(FrozenModel):
    """The student: which model, in which precision, with or without adapters."""

    model: str | None = Field(
        None,
        description="Folder or hub name of the student, a causal language model that transformers can load. A model "
        "that sees images is trained on them if its processor is saved beside it; without one, its text alone is.",
    )
    from_scratch: str | dict[str, Any] | None = Field(
        None,
        description="Start from random weights and the dataset's tokenizer instead of model: a folder or hub name with "
        "a config.json, or the content of one, such as {model_type: llama, hidden_size: 512}. A student that sees "
        "images needs a folder with its processor's files too.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of the forward pass; bfloat16 is autocast, about twice as fast on a GPU."
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the weights in training; bfloat16 halves their memory but loses small updates, "
        "except with lora, whose adapters stay float32.",
    )
    attention: str | None = Field(
        None,
        description="Attention implementation of transformers, such as sdpa or flash_attention_2; null lets "
        "transformers choose.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory for about a third more time."
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train LoRA adapters; null trains all weights. Of a model that sees images, only the language "
        "model gets adapters.",
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="Weights that are not trained: vision_tower, projector or language_model for the parts of any "
        "model that sees images, or a module by its own name, such as model.layers.0 or embed_tokens.",
    )

    @model_validator(mode="after")
    def _one_of_model_and_from_scratch(self) -> StudentConfig:
        if (self.model is None) == (self.from_scratch is None):
            raise ValueError("set exactly one of model and from_scratch")
        if self.from_scratch is not None and self.lora is not None:
            raise ValueError("lora needs a pretrained model, not from_scratch")
        if self.lora is not None and self.freeze:
            raise ValueError("lora trains its adapters alone: remove freeze")
        if isinstance(self.from_scratch, dict) and "model_type" not in self.from_scratch:
            raise ValueError("from_scratch needs a model_type, such as llama")
        return self

    @property
    def name(self) -> str:
        """The student's name in messages."""
        if self.model is not None:
            return self.model
        if isinstance(self.from_scratch, dict):
            return f"{self.from_scratch['model_type']}{FROM_SCRATCH}"
        return f"{self.from_scratch}{FROM_SCRATCH}"


class OtherTokenizerConfig(FrozenModel):
    """What a student with another tokenizer than the dataset's learns from; ignored for any other."""

    one_to_one: float = Field(
        1.0,
        ge=0,
        description="Weight of the loss at tokens that are one token of the teacher, or the first part of one.",
    )
    chunks: float = Field(
        1.0,
        ge=0,
        description="Weight of ALM (arXiv 2503.20083) on the other tokens of chunks, where both tokenizations meet "
        "only after several tokens.",
    )
    temperature: float = Field(
        100.0, ge=1, description="Temperature of ALM: chunks are compared by their probability to the power of 1 / it."
    )


class DataConfig(FrozenModel):
    """The order of the rows, and how much of each stored distribution is used."""

    seed: int = Field(
        0,
        ge=0,
        lt=1 << 63,
        description="Seed of the row order, which differs in each epoch, and of the choice of draws.",
    )
    weights: list[float] | None = Field(
        None, description="Share of the rows from each of several datasets; null is in proportion to their rows."
    )
    ensemble: list[str] | None = Field(
        None,
        min_length=2,
        description="Instead of dataset, two or more datasets with the same rows, one from each teacher: every row is "
        "trained on all of them.",
    )
    ensemble_weights: list[float] | None = Field(
        None,
        description="Weight of each teacher's loss in data.ensemble, divided by their sum; null weighs all equally.",
    )
    top_k: int | None = Field(
        None, ge=1, description="Kept ids used per position; the others join the tail, and null uses all."
    )
    draws: int | None = Field(
        None, ge=0, description="Draws used per position, counted as the capture counts them; null uses all."
    )
    rows: Literal["all", "without_images"] = Field(
        "all",
        description="without_images passes over rows that have images, for a student that sees none; then all shards "
        "are read once at the start, to count the others.",
    )
    other_tokenizer: OtherTokenizerConfig = Field(
        default_factory=OtherTokenizerConfig,
        description="How a student learns whose tokenizer is not the dataset's; unused if it is.",
    )
    cache_dir: str | None = Field(
        None,
        description="Local folder for copies of remote shards and media; null is $COLDSTILL_CACHE/shards or "
        "~/.cache/coldstill/shards.",
    )
    cache_bytes: int = Field(
        32 << 30,
        ge=1,
        description="Most bytes of copies in cache_dir, a quarter of them for files of media if there are any; the "
        "least recently used are removed first.",
    )


class TrainingConfig(FrozenModel):
    """Optimizer, batches, checkpoints and evaluation. Defaults are those of the TAID repository, if it has them."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    epochs: float = Field(1.0, gt=0, description="Passes over the dataset; ignored if max_steps is set.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps of the run, also if they end within an epoch; null uses epochs."
    )
    batch_size: int = Field(8, ge=1, description="Rows, or packs with pack_length, of one forward pass on one device.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    pack_length: int | None = Field(
        None,
        ge=2,
        description="Pack rows into sequences of up to this many tokens, without attention between rows; null pads the "
        "rows of a batch to the longest.",
    )
    optimizer: str = Field(
        "adamw_torch_fused",
        description="Optimizer by its name in transformers, such as adamw_torch, adamw_8bit or adafactor.",
    )
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of the optimizer steps in which the learning rate rises from 0."
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Learning rate schedule after the warmup."
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Weight decay of the optimizer, not applied to biases and norms."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 turns clipping off.")
    logging_steps: int = Field(10, ge=1, description="Optimizer steps between two lines of the log.")
    save_steps: int = Field(
        200, ge=1, description="Optimizer steps between two checkpoints; an interrupted run resumes from the newest."
    )
    eval_steps: int = Field(200, ge=1, description="Optimizer steps between two evaluations on eval_dataset.")
    best_metric: str | None = Field(
        None,
        description="The checkpoint with the best value of this metric, such as eval_cross_entropy (lowest) or "
        "eval_accuracy (highest), becomes the student, and each evaluation saves a checkpoint; null takes the last.",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations in a row without a better best_metric."
    )
    dataloader_workers: int = Field(
        1, ge=0, description="Processes that read and decode rows; their number does not change the order of rows."
    )
    seed: int = Field(42, ge=0, description="Seed of all random numbers but the row order, such as those of dropout.")
    report_to: str = Field(
        "none", description="Where transformers reports the log: none, tensorboard, wandb or trackio."
    )
    push_to_hub: str | None = Field(
        None, description="Hub repository to upload the finished student to; null uploads nothing."
    )
    grace_s: float = Field(
        20.0,
        ge=0,
        description="Seconds that a running step gets to end after Ctrl-C or SIGTERM, before a checkpoint is written; "
        "Kubernetes kills 30 seconds after SIGTERM, and writing must fit too.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null lets torch choose.")

    @model_validator(mode="after")
    def _patience_needs_a_metric(self) -> TrainingConfig:
        if self.early_stopping_patience is not None and self.best_metric is None:
            raise ValueError("early_stopping_patience needs best_metric, the metric that must improve")
        return self


FREE_TRAINING_SETTINGS = frozenset(
    {"logging_steps", "save_steps", "report_to", "threads", "dataloader_workers", "push_to_hub", "grace_s"}
)
"""Settings of `training` that change no weight, and may differ between two starts of a run."""


class TrainConfig(FrozenModel):
    """All settings of a training run."""

    dataset: str | list[str] | None = Field(
        None, description="Path or URL of a sealed dataset, or a list of them to mix; this or data.ensemble is needed."
    )
    output: str = Field(description="Local folder for checkpoints, the finished student and the summary.")
    student: StudentConfig = Field(description="The student model.")
    eval_dataset: str | None = Field(
        None, description="Path or URL of a sealed dataset of held-out rows to evaluate on during training."
    )
    loss: LossConfig = Field(default_factory=Taid, description="The loss.")
    data: DataConfig = Field(
        default_factory=DataConfig, description="Row order, mixing and use of the stored distributions."
    )
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="Optimizer, batches, checkpoints and evaluation."
    )

    @model_validator(mode="after")
    def _one_of_dataset_and_ensemble(self) -> TrainConfig:
        if (self.dataset is None) == (self.data.ensemble is None):
            found = "nothing, and no data.ensemble" if self.dataset is None else "a value beside data.ensemble"
            raise KeysClash("exactly one of dataset and data.ensemble", key="dataset", found=found)
        if self.data.ensemble is None and self.data.ensemble_weights is not None:
            raise ValueError("data.ensemble_weights needs data.ensemble; the key for a mixed dataset is data.weights")
        if self.data.ensemble is not None and self.data.weights is not None:
            raise ValueError("data.weights needs several datasets to mix; data.ensemble has data.ensemble_weights")
        return self

    @model_validator(mode="after")
    def _best_metric_needs_a_dataset(self) -> TrainConfig:
        if self.training.best_metric is not None and self.eval_dataset is None:
            raise ValueError("training.best_metric needs eval_dataset")
        return self
