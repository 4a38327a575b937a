"""The base class of settings and records: immutable, and without unknown fields."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class FrozenModel(BaseModel):
    """A pydantic model that rejects unknown fields and cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def renamed_field(name: str, *, old: str, **options: Any) -> Any:
    """A pydantic `Field` called `name` that files written before its renaming may still call `old`.

    Dumps, `--help` and suggestions in error messages use `name`. A document with both names is rejected.
    """
    return Field(validation_alias=AliasChoices(name, old), **options)


def other_names(name: str, field: FieldInfo) -> set[str]:
    """The names besides `name` under which a document may hold the field."""
    choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
    return {choice for choice in choices if isinstance(choice, str)} - {name}
