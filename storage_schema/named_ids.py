"""`NamedIds`: which ids a position keeps beside the most probable ones, as the header's `about.score_ids`."""

from __future__ import annotations

from pydantic import Field

from coldstill.common.models import FrozenModel


class NamedIds(FrozenModel):
    """The source column that named the ids, and how many of each kind a position keeps."""

    column: str = Field(max_length=256, description="Column of the source.")
    top_k: int = Field(ge=1, description="Number of the most probable ids that may be kept.")
    most: int = Field(ge=1, description="Maximum number of named ids per position.")


def kept_in_words(top_k: int, kept_ids: str, named: NamedIds | None) -> str:
    """Which ids a position keeps, for people: of a header's `top_k`, `kept_ids` and `about.score_ids`."""
    if kept_ids == "top_k":
        return f"K = {top_k:,}"
    of_top = f"the {named.top_k:,} most probable ones" if named else "the most probable ones"
    return f"at most {top_k:,}: {of_top}, and those that the source named,"
