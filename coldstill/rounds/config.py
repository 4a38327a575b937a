"""Settings of rounds; `coldstill rounds --help` prints the sentence of each key.

This module imports no heavy library, so that `coldstill rounds --help` is quick.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from coldstill.common.models import FrozenModel
from coldstill.pipeline.config import ClusterConfig, SamplingConfig, TeacherConfig
from coldstill.pipeline.source_config import SourceConfig
from coldstill.storage_schema.header import MAX_TOKENS
from coldstill.storage_schema.rows import MAX_MEDIA
from coldstill.trainer.config import DataConfig, StudentConfig, TrainingConfig
from coldstill.trainer.losses import LossConfig
from coldstill.trainer.losses.taid import Taid

MAX_ROUNDS = 1000


class WriterConfig(FrozenModel):
    """The student as the writer of answers."""

    engine: Literal["vllm", "transformers"] = Field(
        default="vllm", description="vllm: fast; transformers: slow, the reference."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Data type of the student's weights while it writes; auto takes that of its files."
    )
    max_length: int = Field(
        default=2048, ge=2, le=MAX_TOKENS, description="Maximum length of a prompt with its answer, in tokens."
    )
    max_images: int = Field(
        default=8,
        ge=1,
        le=MAX_MEDIA,
        description="Maximum number of images of a prompt, for a student that sees images.",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Extra arguments of vLLM's LLM class or of from_pretrained."
    )


class RoundsConfig(FrozenModel):
    """All settings of rounds."""

    output: str = Field(description="Local folder for all rounds: datasets, runs and students.")
    rounds: int = Field(ge=1, le=MAX_ROUNDS, description="Number of rounds; it may be raised later, to go on.")
    decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the training rows that a round's dataset gets, against that of the next round; 1 gives "
        "each round the same share, a smaller value trains less on the answers of earlier students.",
    )
    start_datasets: tuple[str, ...] = Field(
        default=(),
        description="Sealed datasets that every round also trains on, such as one of the teacher's own answers; each "
        "has the share of one more round before the first.",
    )
    source: SourceConfig = Field(description="The prompts, which are the same in every round.")
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How the student answers; round N adds N to the seed."
    )
    writer: WriterConfig = Field(default_factory=WriterConfig, description="The student as the writer of answers.")
    teacher: TeacherConfig
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    rows_per_unit: int = Field(
        default=1024, ge=1, description="Prompts per work unit: one shard, and the most work that a crash loses."
    )
    order: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: one work unit at a time, so that equal rounds give equal bytes; fast: units overlap and "
        "keep the engines full, values agree within their tolerance.",
    )
    student: StudentConfig = Field(description="The student of the first round; each later one trains the last.")
    eval_dataset: str | None = Field(
        default=None, description="Path or URL of a sealed dataset of held-out rows to evaluate on during training."
    )
    loss: LossConfig = Field(default_factory=Taid, description="The loss.")
    data: DataConfig = Field(
        default_factory=DataConfig, description="Row order and use of the stored distributions; round N adds N to seed."
    )
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="Optimizer, batches, checkpoints and evaluation of each round."
    )

    @model_validator(mode="after")
    def _can_go_round(self) -> RoundsConfig:
        if "://" in self.output:
            raise ValueError(f"a local folder as output, where a student can be trained, not {self.output}")
        if self.source.rows_of is not None:
            raise ValueError("prompts in source.path or source.dataset, not source.rows_of")
        if rule := self.source.teacher_prompt_rule:
            # The writer would read that prompt, and the teacher, which scores the stored rows, would not.
            raise ValueError(f"no source.{next(iter(rule))}: teacher and student read the same prompt in rounds")
        if self.student.model is None:
            raise ValueError("student.model, because a student from scratch cannot answer prompts")
        if self.student.lora is not None and not self.student.lora.merge:
            raise ValueError("student.lora.merge true, because the next round needs a whole model")
        if self.data.weights is not None:
            raise ValueError("decay instead of data.weights, because the number of datasets grows")
        if self.decay**self.rounds == 0:
            raise ValueError(f"a larger decay than {self.decay:g}: the first round's share of the last one's rows is 0")
        if self.teacher.max_length < self.writer.max_length:
            raise ValueError(
                f"teacher.max_length of at least writer.max_length, {self.writer.max_length}, not "
                f"{self.teacher.max_length}: the teacher scores whole answers"
            )
        if "max_images" in self.writer.model_fields_set and self.teacher.max_images < self.writer.max_images:
            raise ValueError(
                f"teacher.max_images of at least writer.max_images, {self.writer.max_images}, not "
                f"{self.teacher.max_images}: the teacher scores all answers"
            )
        if self.training.best_metric is not None and self.eval_dataset is None:
            raise ValueError("training.best_metric needs eval_dataset")
        return self
