"""Settings of a capture. Each key has one sentence, which `coldstill capture --help` prints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from coldstill.common.models import FrozenModel
from coldstill.common.plugins import is_plugin, load_plugin
from coldstill.storage_schema.header import MAX_DRAWS, MAX_TOKENS, MAX_TOP_K

ENGINES = ("vllm", "transformers", "endpoint")
"""Engines with a name; others are classes named as `module:name`."""


class SourceConfig(FrozenModel):
    """What the teacher reads."""

    path: str | None = Field(
        default=None,
        description="JSON lines (.jsonl, also .gz and .zst) or Parquet: a local path, a URL that fsspec reaches, or a "
        "pattern such as data/*.jsonl, whose files are read in order of their names.",
    )
    dataset: str | None = Field(
        default=None, description="In place of a path: a hub name or local folder that `datasets` streams."
    )
    dataset_config: str | None = Field(default=None, description="Configuration of that dataset, where it has several.")
    split: str = Field(default="train", description="Split of that dataset.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of that dataset.")
    messages: str = Field(default="messages", description="Column with a chat: a list of {role, content}.")
    tools: str = Field(default="tools", description="Column with the tools that a chat's assistant may call.")
    prompt: str = Field(default="prompt", description="Column with a prompt, as text or messages; see response.")
    response: str = Field(default="response", description="Column with the answer to the prompt, as text.")
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
    template_arguments: dict[str, Any] = Field(
        default_factory=dict, description="Further variables of the chat template, such as enable_thinking."
    )
    over_long: Literal["reject", "cut", "split"] = Field(
        default="reject",
        description="Rows of more than teacher.max_length tokens: reject them, cut them at the end, or split them into "
        "rows of that length.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("exactly one of path and dataset")
        return self


class TeacherConfig(FrozenModel):
    """Who speaks, and what is kept of it."""

    model: str = Field(description="Folder or hub name of a causal language model.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub repository.")
    engine: str = Field(
        default="vllm",
        description="vllm: fast, in the worker; transformers: slow and plain, the reference; endpoint: a server that "
        "speaks OpenAI's protocol and returns prompt log-probs, such as `vllm serve`: K entries, no draws; "
        "my_module:MyTeacher: a class of your own, see examples/custom_teacher.py.",
    )
    endpoint: str | None = Field(
        default=None, description="Base URL of engine endpoint, for instance http://host:8000/v1."
    )
    tap: Literal["worker", "public"] = Field(
        default="worker",
        description="Of engine vllm. worker: tensors from inside its worker, exact tail, draws; public: its "
        "prompt_logprobs, slower, derived tail, no draws.",
    )
    runner: Literal["v1", "v2"] = Field(
        default="v1", description="Model runner of engine vllm that is tapped; v2 has not been run on a GPU yet."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Data type of the weights; auto takes the one in the model's configuration."
    )
    head_dtype: Literal["auto", "float32", "model"] = Field(
        default="auto",
        description="Data type of the logits: auto takes float32 where the engine can, for a bfloat16 head rounds "
        "away half of the order; model takes that of the weights.",
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
    draw_logprobs: bool = Field(default=False, description="Record the log-prob of each kept draw too.")
    draw_seed: int = Field(default=0, ge=0, lt=1 << 63, description="Key of the generator of the draws.")
    max_length: int = Field(default=2048, ge=2, le=MAX_TOKENS, description="The most tokens of a row.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of vLLM's LLM class, or of from_pretrained; of engine endpoint: served_model, "
        "concurrency, timeout_s, attempts.",
    )

    @property
    def can_draw(self) -> bool:
        """Whether the engine gives exact tails and draws. Raises `PluginNotFound` for a class that is not there."""
        if is_plugin(self.engine):
            return getattr(load_plugin(self.engine, key="teacher.engine"), "tail", "derived") == "exact"
        return self.engine == "transformers" or (self.engine == "vllm" and self.tap == "worker")

    @field_validator("engine")
    @classmethod
    def _is_known(cls, engine: str) -> str:
        if engine not in ENGINES and not is_plugin(engine):
            raise ValueError(f"{', '.join(ENGINES)}, or module:name of a class of your own")
        return engine

    @model_validator(mode="after")
    def _fits_the_engine(self) -> TeacherConfig:
        if self.draws and not self.can_draw:
            way = "tap public" if self.engine == "vllm" else f"engine {self.engine}"
            raise ValueError(f"draws 0, not {self.draws}: {way} cannot draw; tap worker and engine transformers can")
        if (self.engine == "endpoint") != (self.endpoint is not None):
            raise ValueError("teacher.endpoint with engine endpoint, and only with it")
        return self


class SamplingConfig(FrozenModel):
    """How the teacher answers, in mode generate."""

    temperature: float = Field(default=1.0, ge=0, description="0: always the most probable token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Only the most probable tokens of this mass are sampled.")
    n: int = Field(default=1, ge=1, le=1024, description="Answers to each prompt.")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Of the sampler; each answer has a key of its own.")
    max_tokens: int = Field(default=512, ge=1, le=MAX_TOKENS, description="The most tokens of an answer.")
    stop: tuple[str, ...] = Field(default=(), description="Texts at which an answer ends, besides the end of turn.")


class ClusterConfig(FrozenModel):
    """Where it runs."""

    min_workers: int = Field(default=1, ge=1, description="Units are given out once so many workers are ready.")
    max_workers: int = Field(default=1, ge=1, description="The most Ray actors, each with an engine of its own.")
    cpus_per_worker: float = Field(
        default=1, gt=0, description="Cores that Ray reserves for a worker; its OpenMP threads."
    )
    gpus_per_worker: float | None = Field(
        default=None,
        ge=0,
        description="GPUs that Ray reserves for a worker; by default tensor times pipeline parallel size where the "
        "cluster has GPUs.",
    )
    address: str | None = Field(
        default=None, description="Ray cluster to join; by default RAY_ADDRESS, else one is started on this machine."
    )
    hung_after_s: float = Field(
        default=600,
        gt=0,
        description="An engine without progress for so long is hung: its worker ends itself.",
    )
    store_patience_s: float = Field(
        default=300,
        ge=0,
        description="How long a worker asks a store again that does not answer, before the capture ends.",
    )
    driver_dead_after_s: float = Field(
        default=120,
        gt=0,
        description="A driver that gave no sign of life for so long is dead, and a new one takes over.",
    )
    price_per_gpu_hour: float | None = Field(
        default=None, ge=0, description="For the cost that `status` and `--dry-run` show, in any currency."
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> ClusterConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers at most max_workers, {self.max_workers}, not {self.min_workers}")
        return self


class CaptureConfig(FrozenModel):
    """A whole capture."""

    output: str = Field(description="The dataset's directory: a path that all workers see, s3:// or gs://.")
    source: SourceConfig
    teacher: TeacherConfig
    mode: Literal["score", "generate", "pretrain"] = Field(
        default="score",
        description="score: the source's own answers; generate: the teacher answers the source's prompts; pretrain: "
        "raw text, all positions are targets.",
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    documents: Literal["isolate", "concat"] = Field(
        default="isolate",
        description="Of mode pretrain. isolate: each document is a row of its own; concat: the documents of a unit are "
        "joined by separators and cut to rows of teacher.max_length.",
    )
    order: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: a unit is a barrier, equal captures give equal bytes; fast: engines stay full across "
        "units, values within the engine's tolerance.",
    )
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
    max_attempts: int = Field(
        default=2,
        ge=1,
        description="Deaths of a worker over one unit alone, before its rows are searched for the one that kills it.",
    )
    licence: str | None = Field(default=None, description="Under which terms the dataset may be used, for its header.")
