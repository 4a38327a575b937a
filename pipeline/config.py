"""Settings of a capture; `coldstill capture --help` prints the sentence of each key."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from coldstill.common.models import FrozenModel, renamed_field
from coldstill.common.plugins import is_plugin, load_plugin
from coldstill.storage_schema.header import MAX_DRAWS, MAX_TOKENS, MAX_TOP_K
from coldstill.storage_schema.rows import MAX_MEDIA

from .source_config import TEACHER_PROMPT_KEYS, SourceConfig

ENGINES = ("vllm", "transformers", "endpoint")
"""Built-in engines; others are the user's classes, named as `module:name`."""

READ_FACTOR = 4
"""Default of `max_read_length`, in `max_length`: room for a prompt of some documents."""


_TOP_K_WITHOUT_DRAWS = 16
"""Without draws a cache holds nothing of the tail but its mass, so that more ids are worth their bytes."""


class TeacherConfig(FrozenModel):
    """The teacher, and which part of its distributions is stored."""

    model: str = Field(description="Folder or Hub name of a causal language model.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the Hub repository.")
    adapter: str | None = Field(
        default=None, description="Folder or Hub name of a LoRA adapter of that model, as peft saves it."
    )
    adapter_revision: str | None = Field(
        default=None, description="Branch, tag or commit of the adapter's Hub repository."
    )
    engine: str = Field(
        default="vllm",
        description="vllm: fast, in the worker; transformers: slow, the reference; endpoint: an OpenAI-compatible "
        "server that returns prompt log-probs, such as `vllm serve`: top K only, no draws; my_module:MyTeacher: your "
        "own class, see examples/custom_teacher.py.",
    )
    endpoint: str | None = Field(
        default=None, description="Base URL of the server for engine endpoint, such as http://host:8000/v1."
    )
    tap: Literal["worker", "public"] = Field(
        default="worker",
        description="How log-probs are read from vLLM. worker: inside its worker, exact tail and draws; public: its "
        "prompt_logprobs, slower, derived tail, no draws.",
    )
    runner: Literal["v1", "v2"] = Field(
        default="v1", description="vLLM's model runner that tap worker reads; v2 has not been run on a GPU yet."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Data type of the weights; auto takes it from the model's config.json, which may be float32 and "
        "cost twice the memory of bfloat16.",
    )
    head_dtype: Literal["auto", "float32", "model"] = Field(
        default="auto",
        description="Data type of the logits. auto: float32 if the engine can, because bfloat16 rounding changes half "
        "of the ranks; model: that of the weights.",
    )
    top_k: int = Field(
        default=8,
        ge=1,
        le=MAX_TOP_K,
        description="K: maximum number of token ids kept per position; by default 16 without draws.",
    )
    min_prob: float = Field(
        default=1e-4, ge=0, lt=1, description="Token ids of the top K with a lower probability are not kept."
    )
    draws: int = Field(
        default=64,
        ge=0,
        le=MAX_DRAWS,
        description="D. Systematic: a position gets D times the mass of its tail, which is what lies outside its kept "
        "ids; iid: D from the full softmax, of which those in the tail are stored. By default 0 if the engine cannot "
        "draw.",
    )
    draw_method: Literal["systematic", "iid"] = Field(
        default="systematic",
        description="How draws are made. systematic: at equal distances on the cumulative sum of the tail, with a "
        "random shift, for less noise; iid: independently. An engine of your own has that of its class.",
    )
    kept_draws: int = Field(
        default=64, ge=0, le=MAX_DRAWS, description="Maximum number of tail draws stored per position."
    )
    draw_logprobs: bool = Field(default=False, description="Store the log-prob of each kept draw too.")
    draw_seed: int = Field(default=0, ge=0, lt=1 << 63, description="Seed of the draws.")
    max_length: int = Field(
        default=2048,
        ge=2,
        le=MAX_TOKENS,
        description="Maximum length of a row, in tokens; images count as the teacher expands them.",
    )
    max_read_length: int | None = Field(
        default=None,
        ge=2,
        le=MAX_TOKENS,
        description="Maximum number of tokens that the teacher reads for a row, where it reads another prompt than the "
        f"row's; by default {READ_FACTOR} times max_length, within the model's context. A longer row is rejected.",
    )
    max_images: int = Field(
        default=8, ge=1, le=MAX_MEDIA, description="Maximum number of images of a row, for a teacher that sees images."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Extra arguments of vLLM's LLM class or of from_pretrained; for engine endpoint: served_model, "
        "concurrency, timeout_s, attempts.",
    )

    @property
    def read_length(self) -> int:
        """The maximum number of tokens of a sequence that the engine gets; see `checkpoint.with_read_length`."""
        return self.max_read_length or self.max_length

    @property
    def devices(self) -> int:
        """The devices that hold one engine, by `engine_args`; a size that is null is the engine's default of 1."""
        sizes = (self.engine_args.get(name) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
        return math.prod(int(size or 1) for size in sizes)

    @property
    def is_own_class(self) -> bool:
        """Whether the engine is the user's own class, named as `module:name`."""
        return self.engine not in ENGINES

    @property
    def can_draw(self) -> bool:
        """Whether the engine gives exact tails and draws. Raises `PluginNotFound` for a missing class."""
        if self.is_own_class:
            return getattr(load_plugin(self.engine, key="teacher.engine"), "tail", "derived") == "exact"
        return self.engine == "transformers" or (self.engine == "vllm" and self.tap == "worker")

    @field_validator("engine")
    @classmethod
    def _is_known(cls, engine: str) -> str:
        if engine not in ENGINES and not is_plugin(engine):
            raise ValueError(f"{', '.join(ENGINES)}, or module:name of your own class")
        return engine

    @model_validator(mode="after")
    def _fits_the_engine(self) -> TeacherConfig:
        if self.draws and not self.can_draw and "draws" not in self.model_fields_set:
            object.__setattr__(self, "draws", 0)  # the model is frozen
        if not self.draws and "top_k" not in self.model_fields_set:
            object.__setattr__(self, "top_k", _TOP_K_WITHOUT_DRAWS)
        if self.draws and not self.can_draw:
            way = "tap public" if self.engine == "vllm" else f"engine {self.engine}"
            raise ValueError(f"draws 0, not {self.draws}: {way} cannot draw; tap worker and engine transformers can")
        self._fits_own_method()
        if self.adapter_revision and not self.adapter:
            raise ValueError("teacher.adapter with adapter_revision, not adapter_revision alone")
        if (self.engine == "endpoint") != (self.endpoint is not None):
            raise ValueError("teacher.endpoint with engine endpoint, and only with it")
        return self

    def _fits_own_method(self) -> None:
        """An engine of the user's own draws in one way, which is recorded."""
        if not (self.is_own_class and self.draws):
            return
        own = getattr(load_plugin(self.engine, key="teacher.engine"), "draw_method", "iid")
        if "draw_method" in self.model_fields_set and self.draw_method != own:
            raise ValueError(
                f"draw_method {own}, not {self.draw_method}: so {self.engine} draws, by its attribute draw_method"
            )
        object.__setattr__(self, "draw_method", own)


class SamplingConfig(FrozenModel):
    """How the teacher generates answers, in mode generate."""

    temperature: float = Field(
        default=1.0, ge=0, description="Sampling temperature; 0 always takes the most probable token."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Nucleus sampling: only the most probable tokens of this total mass."
    )
    n: int = Field(default=1, ge=1, le=1024, description="Answers per prompt.")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Seed of the sampler; each answer has its own stream.")
    max_tokens: int = Field(default=512, ge=1, le=MAX_TOKENS, description="Maximum length of an answer, in tokens.")
    stop: tuple[str, ...] = Field(
        default=(), description="Strings that end an answer, in addition to the end-of-turn token."
    )

    @model_validator(mode="after")
    def _answers_differ(self) -> SamplingConfig:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n 1 with temperature 0, whose answers to a prompt are all the same, not n {self.n}")
        return self


class ClusterConfig(FrozenModel):
    """Where the capture runs."""

    min_workers: int = Field(
        default=1, ge=1, description="Number of workers that must be ready before work units are assigned."
    )
    max_workers: int = Field(
        default=1, ge=1, description="Maximum number of workers: Ray actors, each with its own engine."
    )
    cpus_per_worker: float | None = Field(
        default=None,
        gt=0,
        description="CPU cores that Ray reserves per worker; also its number of OpenMP threads, unless OMP_NUM_THREADS "
        "is set. By default 1; on one machine without a GPU, the workers share all cores.",
    )
    gpus_per_worker: float | None = Field(
        default=None,
        ge=0,
        description="GPUs that Ray reserves per worker; by default tensor times pipeline parallel size if the cluster "
        "has GPUs.",
    )
    address: str | None = Field(
        default=None,
        description="Address of the Ray cluster to join; by default RAY_ADDRESS, or else a new one on this machine.",
    )
    hung_after_s: float = Field(
        default=600, gt=0, description="Seconds without progress after which a worker counts as hung and exits."
    )
    store_retry_s: float = renamed_field(
        "store_retry_s",
        old="store_patience_s",
        default=300,
        ge=0,
        description="Seconds for which a failed access to the output store is retried before the capture ends.",
    )
    driver_dead_after_s: float = Field(
        default=120,
        gt=0,
        description="Seconds without a heartbeat after which another driver may take over the capture.",
    )
    price_per_gpu_hour: float | None = Field(
        default=None, ge=0, description="Price of one GPU for one hour, in any currency, for `status` and `--dry-run`."
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> ClusterConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers at most max_workers, {self.max_workers}, not {self.min_workers}")
        return self


class CaptureConfig(FrozenModel):
    """A whole capture."""

    output: str = Field(description="Directory of the dataset: a path that all workers can write, s3:// or gs://.")
    source: SourceConfig
    teacher: TeacherConfig
    mode: Literal["score", "generate", "pretrain"] = Field(
        default="score",
        description="score: the answers in the source are scored; generate: the teacher answers the source's prompts; "
        "pretrain: plain text, every token is a target.",
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    documents: Literal["isolate", "concat"] = Field(
        default="isolate",
        description="How mode pretrain makes rows. isolate: one per document; concat: the documents of a work unit, "
        "joined by end-of-sequence tokens and cut every teacher.max_length tokens.",
    )
    order: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: one work unit at a time, so that equal captures give equal bytes; fast: units overlap and "
        "keep the engine full, values agree within its tolerance.",
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    rows_per_unit: int = Field(
        default=1024, ge=1, description="Source rows per work unit: one shard, and the most work that a crash loses."
    )
    calibration_targets: int = renamed_field(
        "calibration_targets",
        old="pilot_targets",
        default=8192,
        ge=0,
        description="Targets that are scored before all others to find the frequent token ids, which get short codes; "
        "0 skips this calibration pass.",
    )
    fidelity: Literal["fine", "coarse", "exact"] = Field(
        default="fine",
        description="Storage error as mean KL in nats: fine below 1e-5, coarse below 1e-4 in fewer bytes, exact keeps "
        "float16 log-probs.",
    )
    max_attempts: int = Field(
        default=2,
        ge=1,
        description="Crashes that a work unit may cause on its own before its rows are searched for the one that "
        "crashes the worker.",
    )
    license: str | None = renamed_field(
        "license", old="licence", default=None, description="License of the dataset, recorded in its header."
    )

    @model_validator(mode="after")
    def _rows_are_scored(self) -> CaptureConfig:
        if self.source.rows_of is not None and self.mode != "score":
            raise ValueError(f"mode score with source.rows_of, whose rows have their answers, not mode {self.mode}")
        return self

    @model_validator(mode="after")
    def _teacher_prompt_fits(self) -> CaptureConfig:
        keys = ", ".join(self.source.teacher_prompt_rule)
        if keys and self.mode == "pretrain":
            raise ValueError(f"mode score or generate with source.{keys}, not pretrain: documents have no prompt")
        if self.teacher.max_read_length is not None and not keys:
            raise ValueError(f"teacher.max_read_length with one of source.{', source.'.join(TEACHER_PROMPT_KEYS)} only")
        return self

    @model_validator(mode="after")
    def _can_score_named_ids(self) -> CaptureConfig:
        if self.source.score_ids is None:
            return self
        if self.mode != "score":
            raise ValueError(f"mode score with source.score_ids, not {self.mode}: only given rows have such a column")
        if self.teacher.is_own_class or not self.teacher.can_draw:
            way = "tap public" if self.teacher.engine == "vllm" else f"engine {self.teacher.engine}"
            raise ValueError(
                f"engine vllm with tap worker, or engine transformers, with source.score_ids: {way} gives no scores "
                "at named ids"
            )
        kept = self.teacher.top_k + self.source.max_score_ids
        if kept > MAX_TOP_K:
            raise ValueError(f"teacher.top_k + source.max_score_ids at most {MAX_TOP_K}, not {kept}")
        return self

    def kept_width(self, *, token_count: int) -> int:
        """The header's `top_k`: the maximum number of ids that one position keeps."""
        if self.source.score_ids is None:
            return self.teacher.top_k
        return min(self.teacher.top_k + self.source.max_score_ids, token_count)
