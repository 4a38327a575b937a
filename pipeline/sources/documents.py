"""Raw text for mode pretrain: every token is a target.

Documents in; sequences out, one for each document, or, joined end to end, as many of the same length as they fill. Each
document ends with the tokenizer's end-of-sequence token, so that the student learns where texts end, and in joined
rows the same token is the separator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from coldstill.pipeline.sequences import TokenSequence
from coldstill.storage_schema.commits import Reject

from .pieces import OverLong, RowFacts, pieces_of


class Document(NamedTuple):
    """A row's text as tokens, its end included."""

    facts: RowFacts
    token_ids: list[int]


def isolated(document: Document, *, max_length: int, over_long: OverLong) -> Iterator[TokenSequence | Reject]:
    """A document as a row of its own, cut at `max_length` tokens or split."""
    learned = [True] * len(document.token_ids)
    return pieces_of(document.facts, document.token_ids, learned, max_length=max_length, over_long=over_long)


def joined(documents: Iterable[Document | Reject], *, max_length: int) -> Iterator[TokenSequence | Reject]:
    """Rows of exactly `max_length` tokens, the last with what is left. A row is named by the document in which it
    begins and the token of it at which it does (`ID@TOKEN`); `source_rows` in its metadata are the documents in it.

    Of the documents' own columns nothing is kept: a row has parts of several. Rejects pass through.
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
                yield _joined(name, first, rows, row)
                row = []
    if len(row) > 1:
        yield _joined(name, first, rows, row)
    elif row and facts:
        yield facts.reject("no_targets", "one token is left at the end of its unit", sample_id=name)


def _joined(name: str, first: int, rows: list[int], token_ids: list[int]) -> TokenSequence:
    return TokenSequence(
        sample_id=name,
        source_row=first,
        token_ids=np.array(token_ids, np.int32),
        target_spans=np.array([[0, len(token_ids) - 1]], np.int32),
        metadata={"source_rows": rows},
    )
