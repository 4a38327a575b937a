"""From token ids and a loss mask to sequences that a teacher can take: at most `max_length` tokens, and a target each.

What does not fit is rejected, cut or split by choice; a piece without targets is rejected by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from coldstill.pipeline.sequences import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.rows import spans_from_mask
from coldstill.storage_schema.shard.layout import MAX_METADATA_BYTES

from .conversations import RowUnusable

OverLong = Literal["reject", "cut", "split"]
_ROOM_FOR_ID = 64
"""Bytes: what engines and splitting add to a sample id."""


class RowFacts(NamedTuple):
    """What all sequences of a row share."""

    number: int
    sample_id: str
    metadata: Mapping[str, Any]

    def reject(self, reason: str, detail: str, *, sample_id: str = "") -> Reject:
        """The row, or one of its pieces, as a reject."""
        return Reject(self.number, sample_id or self.sample_id, reason, detail)


def sample_id_of(number: int, columns: Mapping[str, Any], *, id_column: str) -> str:
    """A row's own id, or one of its number."""
    given = columns.get(id_column)
    return f"row-{number:09d}" if given is None or given == "" else str(given)


def facts_of(number: int, columns: Mapping[str, Any], *, id_column: str, used: Sequence[str]) -> RowFacts:
    """Sample id and metadata of a row: all columns but those that were `used` for its tokens.

    Raises `RowUnusable` where they are larger than a shard may hold.
    """
    sample_id = sample_id_of(number, columns, id_column=id_column)
    metadata = {name: _plain(value) for name, value in columns.items() if name not in (*used, id_column)}
    size = len(sample_id.encode()) + len(json.dumps(metadata, ensure_ascii=False).encode()) + _ROOM_FOR_ID
    if size > MAX_METADATA_BYTES:
        raise RowUnusable("metadata_too_large", f"{size:,} bytes beside the text, at most {MAX_METADATA_BYTES:,}")
    return RowFacts(number, sample_id, metadata)


def pieces_of(
    facts: RowFacts, token_ids: Sequence[int], learned: Sequence[bool], *, max_length: int, over_long: OverLong
) -> Iterator[TokenSequence | Reject]:
    """The sequence of a row, or those that it is split into (`ID~0`, `ID~1`, ...: end to end they are the row)."""
    if len(token_ids) <= max_length or over_long == "cut":
        yield _piece(facts, facts.sample_id, token_ids[:max_length], learned[:max_length])
    elif over_long == "reject":
        yield facts.reject("over_long", f"{len(token_ids)} tokens, at most {max_length}")
    else:
        for number, start in enumerate(range(0, len(token_ids), max_length)):
            piece = slice(start, start + max_length)
            yield _piece(facts, f"{facts.sample_id}~{number}", token_ids[piece], learned[piece])


def prompt_of(facts: RowFacts, token_ids: Sequence[int], *, max_length: int) -> TokenSequence | Reject:
    """A prompt for the teacher to answer."""
    if not token_ids:
        return facts.reject("no_prompt", "no token before the answer")
    if len(token_ids) >= max_length:
        return facts.reject("no_room", f"{len(token_ids)} tokens of prompt leave no room below {max_length}")
    return _sequence(facts, facts.sample_id, token_ids, np.empty((0, 2), np.int32))


def _piece(
    facts: RowFacts, sample_id: str, token_ids: Sequence[int], learned: Sequence[bool]
) -> TokenSequence | Reject:
    spans = spans_from_mask(learned)
    if not len(spans):
        detail = f"none of its {len(token_ids)} tokens is to be learned"
        return facts.reject("no_targets", detail, sample_id=sample_id)
    return _sequence(facts, sample_id, token_ids, spans)


def _sequence(facts: RowFacts, sample_id: str, token_ids: Sequence[int], spans: np.ndarray) -> TokenSequence:
    return TokenSequence(
        sample_id=sample_id,
        source_row=facts.number,
        token_ids=np.array(token_ids, np.int32),
        target_spans=spans,
        metadata=facts.metadata,
    )


def _plain(value: object) -> object:
    """Metadata is JSON: what JSON cannot say (dates, bytes) is stored as text."""
    return json.loads(json.dumps(value, default=str))
