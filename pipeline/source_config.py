"""Settings of section `source` of a capture: where the text is, and how its rows become chats."""

from __future__ import annotations

import re
from datetime import date
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from coldstill.common.models import FrozenModel
from coldstill.storage_schema.header import MAX_TOP_K
from coldstill.storage_schema.rows import MAX_MEDIA_BYTES

_HOST = re.compile(r"[^\s/@*\[\]]+")
_OF_ROWS = ("rows_of", "round", "images_in_row_bytes")
"""Settings of the source that have an effect on rows of a dataset."""

TEACHER_PROMPT_KEYS = ("teacher_system", "teacher_prompt", "teacher_messages", "teacher_template_arguments")
"""Keys of `source` that give the teacher another prompt than the row's."""

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
        "recorded in the header. Rows whose header names their writer keep its round.",
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
        min_length=1,
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
        min_length=1,
        description="Column with a prompt, as text or messages, that only the teacher reads, in place of all messages "
        "before the first target turn.",
    )
    teacher_messages: str | None = Field(
        default=None,
        min_length=1,
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
