"""`coldstill inspect --html`: one row as a self-contained HTML page.

Style, script, data and small pictures of the row's images are in the file. Its Content-Security-Policy allows no
request and no other script. Text of the dataset is data for that script, and becomes text nodes only.

Shape letters: `T` tokens of the row, `N` target positions, `K` teacher top-k, `S` listed entries of all positions,
`R` tail draws of all positions.
"""

from __future__ import annotations

import base64
import html
import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from coldstill.common.page import digest, page_style
from coldstill.common.visible import visible
from coldstill.storage_schema.header import MAX_VOCAB_SIZE, DatasetHeader
from coldstill.tools.errors import PageNotWritten

from .row_facts import InspectedRow, open_row
from .row_media import page_media, shown_media
from .token_text import MAX_SHOWN, MAX_TOKENS, shortened

MAX_BARS = 256
"""Maximum number of kept entries, and of distinct draws, listed at one position."""

MAX_LISTED = 300_000
"""Maximum number of kept entries, and of distinct draws, on a page: all those of 4,096 tokens at K = 64, about 2 MB
each."""


def write_page(root: str | Path, index: int, path: str | Path) -> Path:
    """Write the page of row `index` of the dataset at `root` to `path`, and return the path.

    Raises `PageNotWritten`, and what `open_row` raises.
    """
    one = open_row(root, index)
    title = f"Row {index} · {one.shown_id}"
    images = dict(shown_media(one.dataset, one.row))
    plain_text = one.text.row(one.row.token_ids[:MAX_TOKENS].tolist(), instead=images)
    page = render(page_data(one), title=title, plain_text=plain_text)
    path = Path(path)
    put_page(path, page.encode())
    return path


def put_page(path: Path, data: bytes) -> None:
    """Write a page or a picture to `path`, and its folder. Raises `PageNotWritten`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise PageNotWritten(
            visible(str(path)), found=error.strerror, wanted="a file that can be written", fix="choose another path"
        ) from None


def render(data: dict[str, Any], *, title: str, plain_text: str) -> str:
    """The page as text. A browser without scripts shows `plain_text`."""
    style, script = page_style() + _part("page.css"), _part("page.js")
    return Template(_part("page.html")).substitute(
        policy=(
            f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
            f"{'img-src data:; ' if data.get('pictures') else ''}base-uri 'none'; form-action 'none'"
        ),
        style=style,
        script=script,
        data=script_safe(data),
        title=html.escape(title),
        plain_text=html.escape(plain_text),
    )


def script_safe(data: Any) -> str:
    """JSON that cannot end the script element around it: ASCII only, without `<`, `>` and `&`."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _origin(header: DatasetHeader) -> str:
    origin = header.about.imported
    return shortened(visible(origin.in_words), MAX_SHOWN) if origin else "another tool's files"


def _part(name: str) -> str:
    return (resources.files("coldstill.tools.inspect") / name).read_text(encoding="utf-8")


def page_data(one: InspectedRow) -> dict[str, Any]:
    """Everything that the page shows: strings that are safe to show, and packed arrays.

    `rest` is the mass of the kept entries that are not listed: listed + rest + tail is 1 at each position.
    """
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
            "sample_id": one.shown_id,
            "tokens": int(one.row.token_ids.size),
            "media": len(one.row.media),
            "metadata": one.metadata_start(indent=2),
        },
        "dataset": {
            "teacher": shortened(visible(header.teacher.full_name), MAX_SHOWN)
            + (", which saw another prompt than the row's" if header.teacher_prompt else "")
            + (f", as named by who imported it from {_origin(header)}" if header.mode == "imported" else ""),
            "id": one.dataset.dataset_id,
            "license": shortened(visible(header.about.license or "not given"), MAX_SHOWN),
            "kept": header.width_in_words,
            "draws": header.draws,
            "kept_draws": header.kept_draws,
        },
        "words": one.text.labels(ids.tolist()),
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
        **page_media(one.dataset, one.row, tokens=token_ids.size),
    }


def _distinct_draws(
    one: InspectedRow, positions: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Position, id, count and probability of the distinct tail draws, most frequent first, at most `most` per position.

    The probabilities are empty if the dataset does not store them.
    """
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


def _packed(values: np.ndarray) -> dict[str, str]:
    """Little-endian bytes in base64 with the name of JavaScript's array type; integers in the narrowest type."""
    if values.dtype.kind == "f":
        kind, stored = "Float32Array", values.astype("<f4")
    elif values.size == 0 or int(values.max()) < 1 << 16:
        kind, stored = "Uint16Array", values.astype("<u2")
    else:
        kind, stored = "Uint32Array", values.astype("<u4")
    return {"type": kind, "base64": base64.b64encode(stored.tobytes()).decode()}
