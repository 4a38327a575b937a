"""Settings of a capture; `coldstill capture --help` prints the sentence of each key."""

from __future__ import annotations

import re
from datetime import date
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from coldstill.common.models import FrozenModel, renamed_field
from coldstill.common.plugins import is_plugin, load_plugin
from coldstill.storage_schema.header import MAX_DRAWS, MAX_TOKENS, MAX_TOP_K
from coldstill.storage_schema.rows import MAX_MEDIA, MAX_MEDIA_BYTES

from .cluster_config import ClusterConfig

_HOST = re.compile(r"[^\s/@*\[\]]+")
_OF_ROWS = ("rows_of", "round", "images_in_row_bytes")
"""Settings of the source that have an effect on rows of a dataset."""
ENGINES = ("vllm", "transformers", "endpoint")
"""Built-in engines; others are the user's classes, named as `module:name`."""

TEACHER_PROMPT_KEYS = ("teacher_system", "teacher_prompt", "teacher_messages", "teacher_template_arguments")
"""Keys of `source` that give the teacher another prompt than the row's."""
READ_FACTOR = 4
"""Default of `max_read_length`, in `max_length`: room for a prompt of some documents."""

Part = Literal["system", "developer", "text_beside_calls", "reasoning", "tool_calls", "tool_results", "tools"]
"""Parts of a chat that a chat template may leave out, if the settings accept it; never the text of a turn."""


class SourceConfig(FrozenModel):
    """The text that the teacher reads."""

    path: str | None = Field(
        default=None,
        description="JSON Lines (.jsonl, also .gz and .zst), a JSON array (.json) or Parquet: a local path, a URL that "
        "fsspec opens, a folder, or a pattern such as data/*.jsonl, whose files are read in alphabetical order.",
    )
    dataset: str | None = Field(
        default=None, description="Instead of a path: a Hub name, or a local folder that `datasets` streams or saved."
    )
    rows_of: str | None = Field(
        default=None,
        description="Instead of a path: a sealed Coldstill dataset, local or a URL, whose rows are scored as they are, "
        "without template and tokenizer, in mode score. The teacher needs that dataset's tokenizer; a work unit is one "
        "of its shards.",
    )
    round: int = Field(
        default=0,
        ge=0,
        description="With rows_of: number of the round in which those rows were written, if a model wrote them; "
        "recorded in the header.",
    )
    dataset_config: str | None = Field(
        default=None, description="Configuration of that dataset, if it has more than one."
    )
    split: str = Field(default="train", description="Split of that dataset.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of that dataset.")
    adapter: str | None = Field(
        default=None,
        description="Your function, as my_module:my_function: takes a row as a dict and returns a dict with the "
        "columns below, or None to reject the row; see examples/source_adapter.py.",
    )
    messages: str = Field(default="messages", description="Column with a chat: a list of {role, content}.")
    tools: str = Field(default="tools", description="Column with the tools that the chat's assistant may call.")
    prompt: str = Field(default="prompt", description="Column with a prompt, as text or messages; see response.")
    response: str = Field(default="response", description="Column with the answer to the prompt, as text or messages.")
    text: str = Field(default="text", description="Column with plain text, for rows without a chat.")
    images: str = Field(
        default="images",
        description="Column with the images of a chat, in the order of its image parts or <image> marks: each a path, "
        "an address, a data URI, bytes, or {bytes, path} as of datasets' Image.",
    )
    image_root: str | None = Field(
        default=None,
        description="Folder or URL that relative paths of images start at; by default the folder of the source's file, "
        "of a pattern the part before its first wildcard. An address of an object store must be in the bucket of this "
        "or of the source.",
    )
    image_hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts from which images may be downloaded over http and https, such as images.example.com.",
    )
    images_in_row_bytes: int = Field(
        default=1 << 18,
        ge=0,
        le=MAX_MEDIA_BYTES,
        description="Images of at most this many bytes are stored in the rows; each larger one is a file in media/, "
        "stored once. A dataset can have about 200,000 such files.",
    )
    id: str = Field(
        default="id", description="Column with the sample id; a row without one is named after its row number."
    )
    duplicate_ids: Literal["refuse", "number"] = Field(
        default="refuse",
        description="What happens to ids that several rows have. refuse: the capture does not start; number: the row "
        "number is added to each id, as ID#ROW.",
    )
    score_ids: str | None = Field(
        default=None,
        description="Column with token ids that are scored besides the top K, in mode score: a list of ids for all "
        "target tokens of the row, or a list of such lists, one for each target token.",
    )
    max_score_ids: int = Field(
        default=64,
        ge=1,
        lt=MAX_TOP_K,
        description="Maximum number of those ids at one target token; a row with more is rejected.",
    )
    loss_on: Literal["assistant", "last_turn", "all"] = Field(
        default="assistant",
        description="Target tokens of a chat: those of all assistant turns, those of the last one, or all tokens.",
    )
    chat_template: str | None = Field(
        default=None, description="File with a Jinja chat template to use instead of the tokenizer's own."
    )
    template_arguments: dict[str, Any] = Field(
        default_factory=dict, description="Extra variables for the chat template, such as enable_thinking."
    )
    teacher_system: str | None = Field(
        default=None,
        min_length=1,
        description="System message that only the teacher reads, in place of the chat's own one if it has one; see "
        "docs/teacher_prompt.md.",
    )
    teacher_prompt: str | None = Field(
        default=None,
        description="Column with a prompt, as text or messages, that only the teacher reads, in place of all messages "
        "before the first target turn.",
    )
    teacher_messages: str | None = Field(
        default=None,
        description="Column with the whole chat as only the teacher reads it; its target turns are those of the row.",
    )
    teacher_template_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template for the teacher only, on top of template_arguments.",
    )
    template_date: date | None = Field(
        default=None,
        description="Date for a chat template that asks for today's, such as 2026-11-28; by default the day on which "
        "the capture was started.",
    )
    may_drop: tuple[Part, ...] = Field(
        default=(),
        description="Parts of a chat that the chat template may leave out, of system, developer, text_beside_calls, "
        "reasoning, tool_calls, tool_results and tools. A row that loses another part is rejected.",
    )
    over_long: Literal["reject", "cut", "split"] = Field(
        default="reject",
        description="What happens to a row of more than teacher.max_length tokens: reject it, cut off its end, or "
        "split it into rows of that length.",
    )

    @field_validator("image_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST.fullmatch(host):
                raise ValueError(f"hosts such as images.example.com or 10.0.0.7:8000, not {host!r}")
        return hosts

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if sum(place is not None for place in (self.path, self.dataset, self.rows_of)) != 1:
            raise ValueError("exactly one of path and dataset, or rows_of instead")
        fields = {name: field for name, field in type(self).model_fields.items() if name not in _OF_ROWS}
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.rows_of is not None and changed:
            raise ValueError(f"no source.{changed[0]} with rows_of, whose rows are scored as they are")
        if self.rows_of is None and self.round:
            raise ValueError(f"source.round 0 without rows_of, not {self.round}")
        return self

    @property
    def teacher_prompt_rule(self) -> dict[str, Any]:
        """The keys that give the teacher another prompt than the row's, with their values; empty if none is set."""
        return {name: value for name in TEACHER_PROMPT_KEYS if (value := getattr(self, name))}

    @model_validator(mode="after")
    def _one_teacher_prompt(self) -> SourceConfig:
        keys = self.teacher_prompt_rule
        if "teacher_messages" in keys and (others := keys.keys() & {"teacher_system", "teacher_prompt"}):
            raise ValueError(f"teacher_messages, the teacher's whole chat, without {', '.join(sorted(others))}")
        if keys and self.over_long != "reject":
            raise ValueError(f"over_long reject with {next(iter(keys))}, not {self.over_long}: answers stay whole")
        if keys and self.loss_on == "all":
            raise ValueError(f"loss_on assistant or last_turn with {next(iter(keys))}, not all: prompts differ")
        return self


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
        default="auto", description="Data type of the weights; auto takes it from the model's config.json."
    )
    head_dtype: Literal["auto", "float32", "model"] = Field(
        default="auto",
        description="Data type of the logits. auto: float32 if the engine can, because bfloat16 rounding changes half "
        "of the ranks; model: that of the weights.",
    )
    top_k: int = Field(default=16, ge=1, le=MAX_TOP_K, description="K: maximum number of token ids kept per position.")
    min_prob: float = Field(
        default=1e-4, ge=0, lt=1, description="Token ids of the top K with a lower probability are not kept."
    )
    draws: int = Field(
        default=64,
        ge=0,
        le=MAX_DRAWS,
        description="D: number of independent draws from the full softmax at each position; by default 0 if the engine "
        "cannot draw.",
    )
    kept_draws: int = Field(
        default=32,
        ge=0,
        le=MAX_DRAWS,
        description="Maximum number of tail draws stored per position: the first ones in draw order.",
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
        if self.draws and not self.can_draw:
            way = "tap public" if self.engine == "vllm" else f"engine {self.engine}"
            raise ValueError(f"draws 0, not {self.draws}: {way} cannot draw; tap worker and engine transformers can")
        if self.adapter_revision and not self.adapter:
            raise ValueError("teacher.adapter with adapter_revision, not adapter_revision alone")
        if (self.engine == "endpoint") != (self.endpoint is not None):
            raise ValueError("teacher.endpoint with engine endpoint, and only with it")
        return self


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
