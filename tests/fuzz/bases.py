"""The valid datasets that are mutated: four small ones, made through the real commit protocol.

In: an empty folder. Out: `Base`: a dataset's files by name. Equal library versions give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from coldstill.storage_schema.commits import Reject, commit_unit
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import CachedRow, MediaReference, span_positions, spans_from_mask
from tests import making

VOCABULARY = 400
"""Above 255, so that ids need escapes."""

_PICTURE = b"\x89PNG, the content of a picture"


_SMALL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
_LARGE = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7") + bytes(64)
"""A PNG and a GIF of one pixel, by hand: the bytes must not depend on a library's release."""


@dataclass(frozen=True)
class Base:
    """A sound dataset: `files` by their names, and the folder in which they lie."""

    name: str
    root: Path
    files: dict[str, bytes]


def make_bases(folder: Path) -> list[Base]:
    """The four datasets, each in a folder of its own below `folder`."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    grid = making.tiny_header(
        tokenizer, top_k=8, draws=6, min_prob=0.01, draw_logprobs=True, codec=Codec.preset("fine", top_k=8)
    )
    exact = making.tiny_header(tokenizer, top_k=5, draws=0, codec=Codec.preset("exact", top_k=5))
    ranked = making.tiny_header(
        tokenizer,
        top_k=8,
        draws=3,
        codec=Codec.preset("coarse", top_k=8),
        id_ranks=tuple(np.random.default_rng(1).permutation(VOCABULARY)[:50].tolist()),
    )
    return [
        _base(folder / "grid", grid, tokenizer, shards=[3, 2], seed=1),
        _base(folder / "float16", exact, tokenizer, shards=[3], seed=2),
        _base(folder / "ranked", ranked, tokenizer, shards=[2, 2], seed=3, media=True),
        _images(folder / "images", tokenizer),
    ]


def read_files(root: Path) -> dict[str, bytes]:
    """All files below `root` by name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _base(
    root: Path, header: DatasetHeader, tokenizer: Path, *, shards: list[int], seed: int, media: bool = False
) -> Base:
    rng = np.random.default_rng(seed)
    store = making.begin_dataset(root, header, tokenizer, [shards[0] + 1, *shards[1:]])  # one row of unit 0 is rejected
    if media:
        store.put("media/cat.png", _PICTURE)
    for unit, count in enumerate(shards):
        rows = [_row(rng, header, f"row-{unit}-{number} ü") for number in range(count)]
        if media:
            rows[0] = replace(rows[0], media=_media())
        rejects = [Reject(7, "bad", "over_long", "65 tokens")] if unit == 0 else []
        commit_unit(
            store, unit, rows=rows, rejects=rejects, header=header, environment={"engine": "none"}, faithful_positions=4
        )
    seal(store)
    return Base(root.name, root, read_files(root))


def _images(root: Path, tokenizer: Path) -> Base:
    """Rows with images under a header that names their placeholder: in the row, as a file, and as the same file."""
    processor = {"name": "P", "settings_sha256": "0" * 64, "settings": {"image_token_id": 7, "size": {"height": 8}}}
    about = {"processor": processor, "media_in_row_bytes": len(_SMALL)}
    header = making.tiny_header(tokenizer, top_k=4, draws=2, codec=Codec.preset("fine", top_k=4), about=about)
    store, rng = making.begin_dataset(root, header, tokenizer, [2, 1]), np.random.default_rng(4)
    for unit, rows in enumerate(([[_SMALL, _LARGE], []], [[_LARGE, _SMALL, _LARGE]])):
        made = []
        for number, images in enumerate(rows):
            places = [2 * n for n in range(len(images))]
            tokens = rng.integers(8, VOCABULARY, 16, dtype=np.int32)
            tokens[places] = 7
            spans, positions = np.array([[8, 15]], np.int32), np.arange(8, 15)
            probs = making.random_probs(rng, 7, VOCABULARY, sharpness=4)
            targets = making.targets_of(probs, tokens[positions + 1], top_k=4, draws=2, seed=unit)
            media = tuple(
                MediaReference(position=at, type=kind, sha256=hashlib.sha256(data).hexdigest(), data=data)
                for at, data in zip(places, images, strict=True)
                for kind in ("image/png" if data == _SMALL else "image/gif",)
            )
            name = f"image-{unit}-{number}"
            made.append(CachedRow(sample_id=name, token_ids=tokens, target_spans=spans, targets=targets, media=media))
        commit_unit(store, unit, rows=made, rejects=[], header=header, environment={}, faithful_positions=2)
    seal(store)
    return Base(root.name, root, read_files(root))


def _row(rng: np.random.Generator, header: DatasetHeader, sample_id: str) -> CachedRow:
    tokens = rng.integers(0, VOCABULARY, int(rng.integers(6, 20)), dtype=np.int32)
    learned = rng.random(tokens.size) < 0.7
    learned[-1] = True
    spans = spans_from_mask(learned)
    positions = span_positions(spans)
    probs = making.random_probs(rng, positions.size, VOCABULARY, sharpness=4)
    targets = making.targets_of(
        probs,
        tokens[positions + 1],
        top_k=header.top_k,
        min_prob=header.min_prob,
        draws=header.draws,
        seed=int(rng.integers(1 << 30)),
        draw_logprobs=header.draw_logprobs,
    )
    return CachedRow(
        sample_id=sample_id,
        token_ids=tokens,
        target_spans=spans,
        targets=targets,
        metadata={"n": sample_id, "deep": [{"a": 1.5}, None, "é"]},
    )


def _media() -> tuple[MediaReference, ...]:
    digest = hashlib.sha256(_PICTURE).hexdigest()
    return (
        MediaReference(position=1, type="image/png", sha256=digest, data=_PICTURE),
        MediaReference(position=3, type="image/png", sha256=digest, path="media/cat.png"),
    )


def _tokenizer() -> dict[str, object]:
    """A `tokenizer.json`, written by hand: the bytes must not depend on a library's release."""
    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    added = [{"id": 0, "content": "t0", "special": True}]
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
