"""Settings of the imports, from which `coldstill import ... --help` is made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from coldstill.common.models import FrozenModel


class ImportSettings(FrozenModel):
    """Settings of every import."""

    tokenizer: Path = Field(description="Local folder with the teacher's tokenizer.json.")
    teacher: str = Field(description="The teacher's name, for the header.")
    revision: str | None = Field(default=None, description="The teacher's revision, for the header.")
    tool_version: str | None = Field(
        default=None, description="Version or commit of the tool that wrote the files, for the header."
    )
    vocab_size: int | None = Field(
        default=None, description="Logit columns of the teacher; default: the number of the tokenizer's ids."
    )
    fidelity: Literal["fine", "coarse", "exact"] = Field(
        default="fine", description="Precision of the stored log-probs; see FORMAT.md."
    )
    max_length: int = Field(default=131_072, description="Longest row in tokens; a longer one is unusable.")
    rows_per_unit: int = Field(default=64, description="Rows per shard; an interruption loses at most one shard.")
    license: str | None = Field(
        default=None, description="License of the dataset, as the Hub spells it, such as apache-2.0."
    )
    normalized_over: Literal["vocabulary", "kept"] | None = Field(
        default=None,
        description="What the log-probs were normalized over: vocabulary, the full softmax; kept, the ids at a "
        "position, so that the tail is lost; default: vocabulary, and refused unless the values show it.",
    )
    assume_aligned: bool = Field(
        default=False,
        description="Import although too few tokens show that each distribution is about the next token.",
    )
    bad_rows: Literal["fail", "reject"] = Field(
        default="fail", description="fail: an unusable row ends the import; reject: it is listed in the rejects."
    )


class DistillKitSettings(ImportSettings):
    """Settings of an import of a capture by arcee-ai/DistillKit."""

    config: str | None = Field(
        default=None, description="Its compression settings, if compression_config.yaml is not in the folder."
    )
    pad_id: int | None = Field(default=None, description="Padding token; one at the end of a document is removed.")


class AxolotlSettings(ImportSettings):
    """Settings of an import of log-probs in the layout of axolotl's KD trainer."""

    predicts: Literal["next", "same"] | None = Field(
        default=None, description="Token that the log-probs at a position predict; default: as the layout defines it."
    )
    logprobs_field: str = Field(default="logprobs", description="Column with the log-probs.")
    temperature: float = Field(default=1.0, description="Softmax temperature of the log-probs; only 1 can be imported.")
    top_k: int | None = Field(
        default=None, description="Entries per position; default: the number at the first position."
    )
