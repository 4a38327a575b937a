"""Token sequences of a row: whole, cut or split; a prompt; or documents that are joined.

The loss mask over tokens becomes target spans in `storage_schema.rows.spans_from_mask`, the only place where anything
is shifted. Token ids and loss masks are lists of length `T`, the tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from coldstill.pipeline.reject_reasons import RejectReason
from coldstill.pipeline.score_ids import ids_of_part
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.codec import MAX_ENTRIES
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.rows import MediaReference, spans_from_mask
from coldstill.storage_schema.shard import json_value
from coldstill.storage_schema.shard.layout import MAX_METADATA_BYTES

from .conversation import RowUnusable

OverLong = Literal["reject", "cut", "split"]
_ROOM_FOR_ID = 64
"""Bytes that engines and splitting may append to a sample id."""


class RowFacts(NamedTuple):
    """What all sequences of a row share. `media`: the row's images, with their positions in the whole row; `score_ids`:
    see `score_ids.read_score_ids`."""

    number: int
    sample_id: str
    metadata: Mapping[str, Any]
    media: tuple[MediaReference, ...] = ()
    score_ids: np.ndarray | None = None

    def reject(self, reason: RejectReason, detail: str, *, sample_id: str = "") -> Reject:
        """The row, or one of its parts, as a reject."""
        return Reject(self.number, sample_id or self.sample_id, reason, detail)


class Document(NamedTuple):
    """A row's text as tokens, with the end-of-sequence token.

    The end token teaches the student where texts end; in joined rows it is the separator.
    """

    facts: RowFacts
    token_ids: list[int]


def sample_id_of(number: int, columns: Mapping[str, Any], source: SourceConfig) -> str:
    """A row's own id, or one made of its number."""
    given = columns.get(source.id)
    if given is None or given == "":
        return f"row-{number:09d}"
    return f"{given}#{number}" if source.duplicate_ids == "number" else str(given)


def facts_of(number: int, columns: Mapping[str, Any], source: SourceConfig, *, used: Sequence[str]) -> RowFacts:
    """Sample id and metadata of a row: all columns except those that were `used` for its tokens.

    Raises `RowUnusable` if they are larger than a shard may store.
    """
    sample_id = sample_id_of(number, columns, source)
    kept = {name: value for name, value in columns.items() if name not in (*used, source.id)}
    if source.dataset is not None:
        kept = {name: _without_images(value) for name, value in kept.items()}
    # Values that JSON cannot hold (dates, bytes) become strings.
    metadata = {name: json_value(value, default=str) for name, value in kept.items()}
    size = len(sample_id.encode()) + len(json.dumps(metadata, ensure_ascii=False).encode()) + _ROOM_FOR_ID
    if size > MAX_METADATA_BYTES:
        detail = f"{size:,} bytes in other columns than the text, at most {MAX_METADATA_BYTES:,}"
        raise RowUnusable(RejectReason.METADATA_TOO_LARGE, detail)
    return RowFacts(number, sample_id, metadata)


def _without_images(value: object) -> object:
    """A value of a dataset's column with the sizes of its images instead of their bytes."""
    if isinstance(value, list):
        return [_without_images(each) for each in value]
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return {**value, "bytes": f"{len(value['bytes'])} bytes"}
    return value


def split(
    facts: RowFacts, token_ids: Sequence[int], loss_mask: Sequence[bool], *, max_length: int, over_long: OverLong
) -> Iterator[TokenSequence | Reject]:
    """The sequence of a row, or its parts `ID~0`, `ID~1`, ..., which end to end are the row."""
    if len(token_ids) <= max_length or over_long == "cut":
        facts = _named_in(facts, loss_mask, 0, max_length)
        yield _part(facts, facts.sample_id, 0, token_ids[:max_length], loss_mask[:max_length])
    elif over_long == "reject":
        yield facts.reject(RejectReason.OVER_LONG, f"{len(token_ids)} tokens, at most {max_length}")
    else:
        for number, start in enumerate(range(0, len(token_ids), max_length)):
            part = slice(start, start + max_length)
            of_part = _named_in(facts, loss_mask, start, part.stop)
            yield _part(of_part, f"{facts.sample_id}~{number}", start, token_ids[part], loss_mask[part])


def _named_in(facts: RowFacts, loss_mask: Sequence[bool], start: int, stop: int) -> RowFacts:
    """The facts of the row's tokens `start..stop`: the ids that the source names for their targets."""
    if facts.score_ids is None:
        return facts
    return facts._replace(score_ids=ids_of_part(facts.score_ids, loss_mask, start, stop))


def _part(
    facts: RowFacts, sample_id: str, start: int, token_ids: Sequence[int], loss_mask: Sequence[bool]
) -> TokenSequence | Reject:
    """The tokens of a row from index `start` on."""
    spans = spans_from_mask(loss_mask)
    if not len(spans):
        detail = f"none of its {len(token_ids)} tokens is a target"
        return facts.reject(RejectReason.NO_TARGETS, detail, sample_id=sample_id)
    stop = start + len(token_ids)
    media = (replace(item, position=item.position - start) for item in facts.media if start <= item.position < stop)
    return _sequence(facts, sample_id, token_ids, spans, tuple(media))


def prompt(facts: RowFacts, token_ids: Sequence[int], *, max_length: int) -> TokenSequence | Reject:
    """A prompt for the teacher to answer."""
    if not token_ids:
        return facts.reject(RejectReason.NO_PROMPT, "no token before the answer")
    if len(token_ids) >= max_length:
        detail = f"{len(token_ids)} tokens of prompt leave no room below {max_length}"
        return facts.reject(RejectReason.NO_ROOM, detail)
    return _sequence(facts, facts.sample_id, token_ids, np.empty((0, 2), np.int32), facts.media)


def _sequence(
    facts: RowFacts, sample_id: str, token_ids: Sequence[int], spans: np.ndarray, media: tuple[MediaReference, ...]
) -> TokenSequence:
    return TokenSequence(
        sample_id=sample_id,
        source_row=facts.number,
        token_ids=np.array(token_ids, np.int32),
        target_spans=spans,
        metadata=facts.metadata,
        media=media,
        score_ids=facts.score_ids,
    )


def storable(made: Iterable[TokenSequence | Reject], *, width: int) -> Iterator[TokenSequence | Reject]:
    """The same, with a reject for each sequence whose targets, `width` kept ids each, are more than a row may store."""
    for one in made:
        targets = int(np.diff(one.target_spans).sum()) if isinstance(one, TokenSequence) else 0
        if isinstance(one, TokenSequence) and targets * width > MAX_ENTRIES:
            detail = f"{targets:,} targets of {width:,} kept ids, at most {MAX_ENTRIES:,} in a row"
            yield Reject(one.source_row, one.sample_id, RejectReason.TOO_MANY_TARGETS, detail)
        else:
            yield one


def joined(documents: Iterable[Document | Reject], *, max_length: int) -> Iterator[TokenSequence | Reject]:
    """Documents end to end, cut into rows of `max_length` tokens; the last row may be shorter. Every token is a target.

    A row is named `ID@TOKEN` after the document in which it begins and the index of the token there. Its metadata is
    `source_rows`, the documents in it; the documents' own columns are not kept. Rejects are passed through.
    """
    row: list[int] = []
    name, first, rows = "", 0, list[int]()
    facts = None
    for document in documents:
        if isinstance(document, Reject):
            yield document
            continue
        facts, start = document.facts, 0
        while start < len(document.token_ids):
            if not row:
                name, first, rows = f"{facts.sample_id}@{start}", facts.number, []
            taken = document.token_ids[start : start + max_length - len(row)]
            row += taken
            rows.append(facts.number)
            start += len(taken)
            if len(row) == max_length:
                yield _joined_row(name, first, rows, row)
                row = []
    if len(row) > 1:
        yield _joined_row(name, first, rows, row)
    elif row and facts:
        yield facts.reject(RejectReason.NO_TARGETS, "one token is left at the end of its unit", sample_id=name)


def _joined_row(name: str, first: int, rows: list[int], token_ids: list[int]) -> TokenSequence:
    return TokenSequence(
        sample_id=name,
        source_row=first,
        token_ids=np.array(token_ids, np.int32),
        target_spans=np.array([[0, len(token_ids) - 1]], np.int32),
        metadata={"source_rows": rows},
    )
