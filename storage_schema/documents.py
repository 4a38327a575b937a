"""The small JSON files of a dataset: bytes in, a checked model out, or the named error of whoever asked."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from coldstill.common.errors import ColdstillError

MAX_DOCUMENT_BYTES = 48 << 20
"""A manifest of 110,000 shards, which takes 2 s to parse; everything else is far smaller."""
_BYTES_PER_CONTAINER = 64
_BYTES_PER_VALUE = 16
_FREE_CONTAINERS = 1 << 14
_FREE_VALUES = 1 << 20
"""A list or object takes the parser 500 bytes, a value 64. None of our documents is as dense as this."""

Model = TypeVar("Model", bound=BaseModel)


def parse_document(data: bytes, *, model: type[Model], where: str, error: type[ColdstillError]) -> Model:
    """The `model` in `data`, by strict rules. Raises `error` with the first field that breaks one."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise error(f"{where}: size", found=f"{len(data)} bytes", wanted=f"at most {MAX_DOCUMENT_BYTES}")
    containers, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    if (
        containers > _FREE_CONTAINERS + len(data) // _BYTES_PER_CONTAINER
        or values > _FREE_VALUES + len(data) // _BYTES_PER_VALUE
    ):
        raise error(f"{where}: size", found=f"{containers} lists and objects, {values} values", wanted="far fewer")
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as failure:
        first = failure.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise error(f"{where}: {field}", found=repr(first["input"])[:200], wanted=first["msg"]) from None
