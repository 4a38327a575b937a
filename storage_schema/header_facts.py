"""Facts of a header: teacher, adapter, prompt, processor, writer, named ids, and those that a reader may ignore.

Below them, the digests of a model's and an adapter's files by which a header names who scored and who wrote the rows.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from coldstill.common.models import FrozenModel

_SHA256 = "^[0-9a-f]{64}$"
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10


class AdapterFacts(FrozenModel):
    """An adapter on top of the teacher's weights."""

    name: str = Field(description="Hub name, or the last folder of a local path.")
    weights_fingerprint: str = Field(description="Digest like that of the teacher's weights.")


class TeacherFacts(FrozenModel):
    """The teacher model and the numeric types of its engine."""

    name: str = Field(description="Hub name, or the last folder of a local path.")
    revision: str | None = Field(default=None, description="Commit of the Hub repository, for a model of the Hub.")
    weights_fingerprint: str = Field(description="Digest of names, sizes and samples of the weight files.")
    dtype: str = Field(description="Data type of the weights in the engine.")
    head_dtype: str = Field(description="Data type of the logits that the log-probs were computed from.")
    quantization: str | None = Field(default=None, description="Quantization of the weights, if any.")
    adapter: AdapterFacts | None = Field(default=None, description="Adapter on top of the weights, such as LoRA.")
    engine_args: dict[str, JsonValue] = Field(
        default_factory=dict, description="Arguments of the engine that change values, such as a RoPE scale."
    )

    @property
    def full_name(self) -> str:
        """The name with that of the adapter, for people."""
        return f"{self.name} + adapter {self.adapter.name}" if self.adapter else self.name


class TeacherPrompt(FrozenModel):
    """The prompt of the teacher where it is not that of the row."""

    kind: str = Field(max_length=64, description="What made it, such as `system` or `column`.")
    sha256: str = Field(pattern=_SHA256, description="Digest of the text, or of the rule, that made it.")


class ProcessorFacts(FrozenModel):
    """The processor that turned images into the teacher's inputs."""

    name: str = Field(description="Class name.")
    settings_sha256: str = Field(pattern=_SHA256, description="Digest of its settings.")
    settings: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="The settings that decide how many patches an image becomes; `image_token_id` is the placeholder.",
    )

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for one image in a row's `token_ids`, if the settings have it."""
        found = self.settings.get("image_token_id")
        return found if isinstance(found, int) and not isinstance(found, bool) else None


class RowWriter(FrozenModel):
    """The model that wrote the answers of the rows, where it was not the source or the teacher."""

    name: str = Field(description="Hub name, or the last folder of a local path.")
    revision: str | None = Field(default=None, description="Commit of the Hub repository, for a model of the Hub.")
    weights_fingerprint: str = Field(description="Digest like that of the teacher's weights.")
    round: int = Field(ge=0, description="Number of the round of captures, from 0.")


class NamedIds(FrozenModel):
    """The source column that named the ids, and how many of each kind a position keeps."""

    column: str = Field(max_length=256, description="Column of the source.")
    top_k: int = Field(ge=1, description="Number of the most probable ids that may be kept.")
    most: int = Field(ge=1, description="Maximum number of named ids per position.")


class ImportFacts(FrozenModel):
    """The files that an import read. They show the layout; the importer stated the rest."""

    tool: str = Field(max_length=64, description="The tool in whose layout the files are, such as `DistillKit`.")
    tool_version: str | None = Field(
        default=None, max_length=128, description="Its version as the importer gave it: the files do not hold one."
    )
    layout: str = Field(max_length=128, description="Which layout of the tool.")
    first_file: str = Field(max_length=256, description="Name of the first file, relative to the folder that was read.")
    files: int = Field(ge=1, description="Number of files.")

    @property
    def in_words(self) -> str:
        """Tool, version, layout and files, for people."""
        version = f"{self.tool_version}, as the importer named it" if self.tool_version else "not known"
        others = f" and {self.files - 1:,} more" if self.files > 1 else ""
        return f"{self.tool}, version {version}; layout: {self.layout}; file {self.first_file}{others}"


class About(BaseModel):
    """Facts that a reader may ignore. Unknown ones are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    license: str | None = Field(default=None, description="License of the dataset.")
    normalized_over: Literal["vocabulary", "kept"] | None = Field(
        default=None,
        description="What the importer stated that the log-probs were normalized over: `vocabulary`, the full softmax; "
        "`kept`, the kept ids, so that the tail is lost.",
    )
    source_adapter: str | None = Field(
        default=None, description="Function that turned rows of the source into chats or text, `module:name`."
    )
    template_arguments: dict[str, JsonValue] | None = Field(default=None, description="Arguments of the chat template.")
    template_date: str | None = Field(
        default=None, pattern=r"^\d{4}-\d\d-\d\d$", description="The date given to a chat template that shows today's."
    )
    end_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, max_length=1024, description="Token ids at which the teacher stops."
    )
    tokenizer_pipeline_sha256: str | None = Field(
        default=None, pattern=_SHA256, description="Digest of the tokenizer's steps between text and tokens."
    )
    media_in_row_bytes: int | None = Field(
        default=None, ge=0, description="Media of at most this many bytes are stored in the rows, larger ones as files."
    )
    max_images: int | None = Field(default=None, ge=1, description="Rows with more images were rejected.")
    max_read_length: int | None = Field(
        default=None, ge=2, description="With a `teacher_prompt`: tokens that the teacher read for a row, at most."
    )
    processor: ProcessorFacts | None = None
    writer: RowWriter | None = None
    writer_prompt: TeacherPrompt | None = Field(
        default=None, description="How the prompt was made that `writer` read, where it was not that of the row."
    )
    score_ids: NamedIds | None = None
    imported: ImportFacts | None = Field(default=None, description="In mode `imported`: what was read.")

    @property
    def is_by_student(self) -> bool:
        """Whether a model other than the teacher wrote the answers, under the prompts of the rows."""
        return self.writer is not None and self.writer_prompt is None

    @property
    def stated(self) -> dict[str, JsonValue]:
        """The facts that are known, as JSON; those of later releases too."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value is not None}

    def shared(self, other: About) -> About:
        """The facts that are equal in both."""
        theirs = other.stated
        equal = {name: value for name, value in self.stated.items() if name in theirs and theirs[name] == value}
        return About.model_validate_json(json.dumps(equal))


def weights_fingerprint(folder: Path) -> str:
    """A digest of the weights, equal for equal copies, without reading hundreds of gigabytes.

    sha256 over name, size and 64 evenly spaced samples of 64 KiB of each weight file in `folder`, and over
    `config.json`. The samples include the header at the start of a safetensors file.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.exists():
        digest.update(config.read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def hub_fingerprint(commit: str | None) -> str:
    """What stands for the digest of a model of the Hub, whose files a commit fixes."""
    return f"commit:{commit}"


def adapter_fingerprint(folder: Path) -> str:
    """sha256 over the whole settings and weights of the adapter in `folder`. Raises `OSError`."""
    digest = hashlib.sha256()
    for name in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
