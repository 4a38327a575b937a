"""The base class of settings and records: immutable, and without unknown fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A pydantic model that rejects unknown fields and cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
