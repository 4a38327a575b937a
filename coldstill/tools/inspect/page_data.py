"""The data of a row's page: a row with its facts in, a JSON document of short strings and packed arrays out.

Shape letters: `T` tokens of the row, `N` target positions, `K` teacher top-k, `S` listed entries of all positions,
`R` tail draws of all positions.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from coldstill.common.visible import visible
from coldstill.storage_schema.header import MAX_VOCAB_SIZE
from coldstill.tools.inspect.one_row import OneRow

MAX_TOKENS = 20_000
"""Tokens of a page; the rest of a longer row is left out, and the page says so."""

MAX_BARS = 256
"""Kept entries and distinct draws that are listed at one position."""

MAX_LISTED = 300_000
"""Kept entries, and distinct draws, listed on the whole page: all of 4,096 tokens at K = 64, about 2 MB each."""

MAX_METADATA = 20_000
"""Characters of the metadata that are shown."""


def page_data(one: OneRow) -> dict[str, Any]:
    """Everything that the page shows. All strings are safe to show; entries that are not listed keep their mass in
    `rest`, so that listed + rest + tail is 1 at each position."""
    token_ids = one.row.token_ids[:MAX_TOKENS].astype(np.int64)
    facts, header = one.facts, one.dataset.header
    shown = facts.positions + 1 < token_ids.size
    positions = int(shown.sum())
    bars = min(header.top_k, MAX_BARS, max(1, MAX_LISTED // max(positions, 1)))
    listed = np.minimum(facts.counts[:positions], bars)
    in_list = np.arange(facts.ids.shape[1]) < listed[:, None]
    draw_owner, draw_ids, draw_times, draw_probs = _distinct_draws(one, positions, bars)
    top_ids = facts.ids[:positions][in_list].astype(np.int64)
    ids, places = np.unique(np.concatenate([token_ids, top_ids, draw_ids]), return_inverse=True)
    token_words, top_words, draw_words = np.split(places, [token_ids.size, token_ids.size + top_ids.size])
    pieces = one.text.pieces(token_ids.tolist())
    piece_table = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    return {
        "row": {
            "index": one.index,
            "rows": len(one.dataset),
            "sample_id": visible(one.row.sample_id)[:200],
            "tokens": int(one.row.token_ids.size),
            "media": len(one.row.media),
            "metadata": _metadata(one),
        },
        "dataset": {
            "teacher": visible(header.teacher.name),
            "id": one.dataset.dataset_id,
            "licence": visible(header.licence or "none named"),
            "top_k": header.top_k,
            "draws": header.draws,
            "kept_draws": header.kept_draws,
        },
        "words": [one.text.label(token_id) for token_id in ids.tolist()],
        "pieces": list(piece_table),
        "token_words": _packed(token_words),
        "token_pieces": _packed(np.array([piece_table[piece] for piece in pieces])),
        "token_ids": _packed(token_ids),
        "positions": _packed(facts.positions[:positions]),
        "entropy": _packed(facts.entropy[:positions].astype("<f4")),
        "surprise": _packed(facts.surprise[:positions].astype("<f4")),
        "tail": _packed(facts.tail_mass[:positions].astype("<f4")),
        "rest": _packed(np.where(in_list, 0.0, facts.probs[:positions]).sum(1).astype("<f4")),
        "rank": _packed(facts.label_rank[:positions]),
        "counts": _packed(facts.counts[:positions]),
        "listed": _packed(listed),
        "top_words": _packed(top_words),
        "top_probs": _packed(facts.probs[:positions][in_list].astype("<f4")),
        "draw_counts": _packed(one.row.targets.draw_counts[:positions]),
        "draw_listed": _packed(np.bincount(draw_owner, minlength=positions)),
        "draw_words": _packed(draw_words),
        "draw_times": _packed(draw_times),
        "draw_probs": _packed(draw_probs),
    }


def _distinct_draws(one: OneRow, positions: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Position, id, multiplicity and probability of the distinct tail draws, often drawn ones first, at most `most` a
    position. The probabilities are empty where the dataset does not keep them."""
    targets = one.row.targets
    owner = np.repeat(np.arange(positions), targets.draw_counts[:positions])
    keys = owner * MAX_VOCAB_SIZE + targets.draw_ids[: owner.size]
    keys, first, times = np.unique(keys, return_index=True, return_counts=True)
    owner, ids = keys // MAX_VOCAB_SIZE, keys % MAX_VOCAB_SIZE
    order = np.lexsort((ids, -times, owner))
    place = np.arange(order.size) - np.searchsorted(owner[order], owner[order])
    order = order[place < most]
    probs = np.empty(0) if targets.draw_logprobs is None else np.exp(targets.draw_logprobs[first][order])
    return owner[order], ids[order], times[order], probs


def _metadata(one: OneRow) -> str:
    if not one.row.metadata:
        return ""
    text = json.dumps(dict(one.row.metadata), ensure_ascii=False, indent=2)
    return visible(text[:MAX_METADATA], newline="\n") + ("…" if len(text) > MAX_METADATA else "")


def _packed(values: np.ndarray) -> dict[str, str]:
    """Little-endian bytes in base64 with the name of JavaScript's array type; integers as narrow as they fit."""
    if values.dtype.kind == "f":
        kind, stored = "Float32Array", values.astype("<f4")
    elif values.size == 0 or int(values.max()) < 1 << 16:
        kind, stored = "Uint16Array", values.astype("<u2")
    else:
        kind, stored = "Uint32Array", values.astype("<u4")
    return {"type": kind, "base64": base64.b64encode(stored.tobytes()).decode()}
