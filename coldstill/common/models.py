"""The pydantic base class of settings and records, and the parser of their JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from .errors import ColdstillError

MAX_DOCUMENT_BYTES = 48 << 20
"""A manifest of 110,000 shards, which takes 2 s to parse; every other document is far smaller."""
_BYTES_PER_CONTAINER = 64
_BYTES_PER_VALUE = 16
_FREE_CONTAINERS = 1 << 14
_FREE_VALUES = 1 << 20
"""The parser needs 500 bytes for a list or object and 64 for a value. No document that we write is as dense as this."""
_MAX_ERRORS = 1000
"""Of more errors none is named: pydantic makes a dictionary of 600 bytes of each, and a document can have millions."""


class FrozenModel(BaseModel):
    """A pydantic model that rejects unknown fields and cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KeysClash(ValueError):
    """Raised by a check over several keys of a section: `key` is the one to change, and `found` what is wrong there."""

    def __init__(self, wanted: str, *, key: str, found: str):
        super().__init__(wanted)
        self.key, self.found = key, found


def renamed_field(name: str, *, old: str, **options: Any) -> Any:
    """A pydantic `Field` called `name` that files written before its renaming may still call `old`.

    Dumps, `--help` and suggestions in error messages use `name`. A document with both names is rejected.
    """
    return Field(validation_alias=AliasChoices(name, old), **options)


def other_names(name: str, field: FieldInfo) -> set[str]:
    """The names besides `name` under which a document may hold the field."""
    choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
    return {choice for choice in choices if isinstance(choice, str)} - {name}


Model = TypeVar("Model", bound=BaseModel)


def too_dense(data: bytes) -> str:
    """How many lists, objects and values a JSON text has, if a parser would need far more memory than its size."""
    containers, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    if (
        containers > _FREE_CONTAINERS + len(data) // _BYTES_PER_CONTAINER
        or values > _FREE_VALUES + len(data) // _BYTES_PER_VALUE
    ):
        return f"{containers} lists and objects, {values} values"
    return ""


def parse_document(data: bytes, *, model: type[Model], where: str, error: type[ColdstillError]) -> Model:
    """The `model` in the JSON text `data`, validated in pydantic's strict mode.

    Raises `error`, located at `where`, that names the first invalid field. Size and density are checked before the
    parser allocates memory.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise error(f"{where}: size", found=f"{len(data)} bytes", wanted=f"at most {MAX_DOCUMENT_BYTES}")
    if found := too_dense(data):
        raise error(f"{where}: size", found=found, wanted="far fewer")
    try:
        return model.model_validate_json(data, strict=True)
    except ValidationError as failure:
        if (count := failure.error_count()) > _MAX_ERRORS:
            raise error(where, found=f"{count:,} invalid or unknown fields", wanted="none") from None
        first = failure.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise error(f"{where}: {field}", found=repr(first["input"])[:200], wanted=first["msg"]) from None


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found
