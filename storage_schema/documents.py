"""The small JSON files of a dataset: bytes in, a checked model out, or the named error of whoever asked."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from .errors import ColdstillError

MAX_DOCUMENT_BYTES = 256 << 20
"""A manifest of 500,000 shards; everything else is far smaller."""

Model = TypeVar("Model", bound=BaseModel)


def parse_document(data: bytes, *, model: type[Model], where: str, error: type[ColdstillError]) -> Model:
    """The `model` in `data`, by strict rules. Raises `error` with the first field that breaks one."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise error(f"{where}: size", found=f"{len(data)} bytes", wanted=f"at most {MAX_DOCUMENT_BYTES}")
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as failure:
        first = failure.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise error(f"{where}: {field}", found=repr(first["input"])[:200], wanted=first["msg"]) from None
