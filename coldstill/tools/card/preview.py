"""The preview of a dataset: some of its targets as a Parquet table that people can read in the Hub's viewer.

The shards hold token ids and binary columns, which a viewer cannot show. `N` is the number of targets in the table, at
most `ROWS * TARGETS`. Logs are natural, entropies in nats. All text passes `visible`: a stranger may have written it.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coldstill.common.visible import NEWLINE, visible
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.errors import TokenizerUnreadable
from coldstill.tools.inspect.row_facts import RowFacts, row_facts
from coldstill.tools.inspect.token_text import TokenText, shortened

ROWS = 10
TARGETS = 30
"""Rows of the dataset, spread over it, and their first targets: a preview has at most 300 rows."""

TOP = 5
CONTEXT_TOKENS = 32
CONTEXT_CHARS = 160
TOKEN_CHARS = 40
ID_CHARS = 100
"""Bounds of each text, so that a preview has at most a few hundred kilobytes."""

SCHEMA = pa.schema(
    [
        ("context", pa.string()),
        ("token", pa.string()),
        ("top_5", pa.string()),
        ("entropy", pa.float32()),
        ("label_rank", pa.int32()),
        ("label_logprob", pa.float32()),
        ("tail_mass", pa.float32()),
        ("row", pa.int64()),
        ("position", pa.int32()),
        ("sample_id", pa.string()),
        ("images", pa.int32()),
        ("token_id", pa.int32()),
        ("top_5_ids", pa.list_(pa.int32())),
        ("top_5_logprobs", pa.list_(pa.float32())),
    ]
)
"""What is read first comes first: a viewer shows the columns in this order."""

COLUMNS = {
    "context": "the text before the token, its end",
    "token": "the token that follows in the text: the label",
    "top_5": "the five most probable tokens that are stored, with their probabilities",
    "entropy": "entropy in nats, of the kept ids and one bucket for the rest",
    "label_rank": "rank of the label among the kept ids, from 1; empty if it is not kept",
    "label_logprob": "log-prob of the label",
    "tail_mass": "probability outside the kept ids",
    "row, position, sample_id": "where the target is: row of the dataset, index of the token in it, id of the sample",
    "images": "number of images before the token",
    "token_id, top_5_ids, top_5_logprobs": "the same for programs",
}
"""Each column of the table, for people."""


def preview_parquet(dataset: Dataset) -> bytes:
    """The preview of a dataset as a Parquet file. Equal datasets give equal bytes with the same release of pyarrow.

    Opens at most `ROWS` shards. Raises `PackagesMissing`, and what `Dataset.row` and `Dataset.check_row` raise.
    """
    text = _text_of(dataset)
    lines: list[dict[str, object]] = []
    for index in _spread(len(dataset)):
        row = dataset.row(index)
        dataset.check_row(row)
        lines += _lines(index, row, row_facts(row), text)
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, SCHEMA), file, compression="zstd")
    return file.getvalue()


def _spread(rows: int) -> list[int]:
    """At most `ROWS` row numbers at equal distances, the first row among them."""
    return sorted({number * rows // ROWS for number in range(ROWS)}) if rows else []


def _text_of(dataset: Dataset) -> TokenText:
    try:
        return TokenText(dataset)
    except TokenizerUnreadable:  # a card is worth more with the ids of tokens than not at all
        return TokenText(None)


def _lines(index: int, row: CachedRow, facts: RowFacts, text: TokenText) -> list[dict[str, object]]:
    """The first `TARGETS` targets of a row as lines of the table."""
    places = [item.position for item in row.media]
    lines: list[dict[str, object]] = []
    for n in range(min(TARGETS, facts.positions.size)):
        position = int(facts.positions[n]) + 1  # of the label: position t is the distribution of token t + 1
        count = min(TOP, int(facts.counts[n]))
        ids, probs = facts.ids[n, :count].tolist(), facts.probs[n, :count]
        shown = [f"{_token(text, token)} {_percent(float(prob))}" for token, prob in zip(ids, probs, strict=True)]
        rank, label = int(facts.label_rank[n]), int(facts.labels[n])
        lines.append(
            {
                "context": _context(row, position, places, text),
                "token": _token(text, label),
                "top_5": "  |  ".join(shown),
                "entropy": float(facts.entropy[n]),
                "label_rank": rank or None,
                "label_logprob": -float(facts.surprise[n]),
                "tail_mass": float(facts.tail_mass[n]),
                "row": index,
                "position": position,
                "sample_id": shortened(visible(row.sample_id[: ID_CHARS + 1]), ID_CHARS),
                "images": sum(place < position for place in places),
                "token_id": label,
                "top_5_ids": ids,
                "top_5_logprobs": np.log(probs).tolist(),
            }
        )
    return lines


def _context(row: CachedRow, position: int, places: list[int], text: TokenText) -> str:
    """The end of the text before token `position`, on one line. An image is shown by its number."""
    start = max(0, position - CONTEXT_TOKENS)
    images = {place - start: f"[image {number}]" for number, place in enumerate(places, 1) if start <= place}
    shown = text.row(row.token_ids[start:position].tolist(), instead=images).replace("\n", NEWLINE)
    cut = len(shown) > CONTEXT_CHARS
    return ("…" if cut or start else "") + (shown[-CONTEXT_CHARS:] if cut else shown)


def _token(text: TokenText, token_id: int) -> str:
    return shortened(text.label(token_id), TOKEN_CHARS)


def _percent(prob: float) -> str:
    return f"{prob:.1%}" if prob >= 0.0005 else "<0.1%"
