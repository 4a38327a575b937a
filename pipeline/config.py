"""Settings of a capture. Each key has one sentence, which `coldstill capture --help` prints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage_schema.header import MAX_DRAWS, MAX_TOKENS, MAX_TOP_K


class Section(BaseModel):
    """Unknown keys are errors; settings do not change once they are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Section):
    """What the teacher reads."""

    path: str = Field(description="A .jsonl or .parquet file: a local path or a URL that fsspec reaches.")
    messages: str = Field(default="messages", description="Column with a chat: a list of {role, content}.")
    text: str = Field(default="text", description="Column with plain text, for rows that have no chat.")
    id: str = Field(
        default="id", description="Column with the sample id; rows without it are named by their row number."
    )
    loss_on: Literal["assistant", "last_turn", "all"] = Field(
        default="assistant", description="Targets of chat rows: the assistant's tokens, those of its last turn, or all."
    )
    chat_template: str | None = Field(
        default=None, description="File with a Jinja chat template that replaces the tokenizer's own."
    )
    over_long: Literal["reject", "cut"] = Field(
        default="reject",
        description="Rows of more than teacher.max_length tokens: reject them, or cut them at the end.",
    )


class TeacherConfig(Section):
    """Who speaks, and what is kept of it."""

    model: str = Field(description="Folder or hub name of a causal language model.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub repository.")
    engine: Literal["vllm", "transformers"] = Field(
        default="vllm",
        description="vllm: fast, K entries, no draws yet; transformers: slow, with draws and exact tail.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Data type of the weights; auto takes the one in the model's configuration."
    )
    top_k: int = Field(default=64, ge=1, le=MAX_TOP_K, description="K: the most ids kept at a position.")
    min_prob: float = Field(
        default=1e-4, ge=0, lt=1, description="Floor: of the top K, ids less probable than this are not kept."
    )
    draws: int = Field(
        default=0, ge=0, le=MAX_DRAWS, description="D: iid draws from the full softmax at each position."
    )
    kept_draws: int = Field(
        default=32, ge=0, le=MAX_DRAWS, description="The most tail draws kept at a position: the first in draw order."
    )
    draw_seed: int = Field(default=0, ge=0, lt=1 << 63, description="Key of the generator of the draws.")
    max_length: int = Field(default=2048, ge=2, le=MAX_TOKENS, description="The most tokens of a row.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of vLLM's LLM class, or of from_pretrained."
    )

    @model_validator(mode="after")
    def _draws_need_an_engine_that_draws(self) -> TeacherConfig:
        if self.engine == "vllm" and self.draws:
            raise ValueError(
                f"draws 0, not {self.draws}: the public path of engine vllm cannot draw; engine transformers can"
            )
        return self


class ClusterConfig(Section):
    """Where it runs."""

    workers: int = Field(default=1, ge=1, description="The most Ray actors, each with an engine of its own.")
    cpus_per_worker: float = Field(
        default=1, gt=0, description="Cores that Ray reserves for a worker; its OpenMP threads."
    )
    gpus_per_worker: float = Field(
        default=0, ge=0, description="GPUs that Ray reserves for a worker: tensor times pipeline parallel size."
    )
    address: str | None = Field(
        default=None, description="Ray cluster to join; by default RAY_ADDRESS, else one is started on this machine."
    )


class CaptureConfig(Section):
    """A whole capture."""

    output: str = Field(description="The dataset's directory: a path that all workers see, s3:// or gs://.")
    source: SourceConfig
    teacher: TeacherConfig
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    rows_per_unit: int = Field(
        default=1024, ge=1, description="Source rows of a unit: one shard, and what a kill can cost at the most."
    )
    pilot_targets: int = Field(
        default=8192,
        ge=0,
        description="Targets that the teacher scores before all others, to learn which ids get short codes; 0: none.",
    )
    fidelity: Literal["fine", "coarse", "exact"] = Field(
        default="fine",
        description="What storage may cost, as mean KL in nats: fine below 1e-5, coarse below 1e-4 in fewer bytes; "
        "exact keeps float16 values in rank order.",
    )
    licence: str | None = Field(default=None, description="Under which terms the dataset may be used, for its header.")
