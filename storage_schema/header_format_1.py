"""The header of format 1 as fields of today's header, and back."""

from __future__ import annotations

import json
from typing import Any

from .errors import InvalidHeader

FIELDS = (
    "format_version",
    "teacher",
    "tokenizer_fingerprint",
    "chat_template_sha256",
    "vocab_size",
    "token_count",
    "top_k",
    "min_prob",
    "draws",
    "kept_draws",
    "draw_logprobs",
    "draw_seed",
    "codec",
    "id_ranks",
    "tail",
    "mode",
    "documents",
    "sampling",
    "loss_on",
    "order",
    "max_length",
    "over_long",
    "rows_per_unit",
    "source_sha256",
    "licence",
)
"""In the order in which format 1 writes them."""
TEACHER_FIELDS = ("name", "revision", "weights_fingerprint", "dtype", "head_dtype", "quantization")


def format_1_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of format 1 among the JSON `fields` of a header; the license is `licence`."""
    teacher = {name: fields["teacher"][name] for name in TEACHER_FIELDS}
    found = {**fields, "teacher": teacher, "licence": fields["about"].get("license")}
    return {name: found[name] for name in FIELDS}


def from_format_1(data: bytes, *, where: str) -> bytes:
    """Today's JSON of a header that `data`, a checked JSON object, gives in format 1.

    Raises `InvalidHeader` for a field that format 1 does not have.
    """
    fields: dict[str, Any] = json.loads(data)
    teacher = fields.get("teacher")
    unknown = [name for name in fields if name not in FIELDS]
    if isinstance(teacher, dict):
        unknown += [f"teacher.{name}" for name in teacher if name not in TEACHER_FIELDS]
    if unknown:
        raise InvalidHeader(f"{where}: {unknown[0][:80]}", found="an unknown field", wanted="the fields of format 1")
    fields["about"] = {"license": fields.pop("licence", None)}
    return json.dumps(fields).encode()
