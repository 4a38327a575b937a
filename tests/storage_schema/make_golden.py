"""Made the golden datasets, those of each format once: `python -m tests.storage_schema.make_golden FOLDER`.

They pin reading: what is in `golden/` is never made again, and every later release must read it. The
expected values beside each dataset come from `plain_decoder.py`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from coldstill.storage_schema.commits import Reject, commit_unit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import Codec, DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_to_bytes
from coldstill.storage_schema.rows import CachedRow, MediaReference, spans_from_mask
from coldstill.storage_schema.store import Store
from tests import making
from tests.storage_schema.plain_decoder import decode_row
from tests.vision import image_bytes

ALL_FIELDS = {
    "teacher": {
        "name": "tiny",
        "weights_fingerprint": "0" * 64,
        "dtype": "float32",
        "head_dtype": "float32",
        "adapter": {"name": "tiny-lora", "weights_fingerprint": "2" * 64},
        "engine_args": {"hf_overrides": {"rope_theta": 1e5}},
    },
    "draw_method": "systematic",
    "draw_from": "tail",
    "draw_number": "by_tail_mass",
    "kept_ids": "top_k_and_named",
    "teacher_prompt": {"kind": "system", "sha256": "3" * 64},
    "about": {
        "license": "MIT",
        "source_adapter": "my_module:chats",
        "template_arguments": {"enable_thinking": False},
        "template_date": "2026-11-28",
        "end_token_ids": [1, 5],
        "tokenizer_pipeline_sha256": "4" * 64,
        "processor": {"name": "TinyProcessor", "settings_sha256": "5" * 64, "settings": {"max_patches": 12}},
        "writer": {"name": "student", "weights_fingerprint": "6" * 64, "round": 1},
        "weather": "a fact that no release knows yet",
    },
}


def main(folder: Path) -> None:
    """All golden datasets with their expected values."""
    for name, changes in {
        "fine_ranks_draws_media": {
            "top_k": 8,
            "token_count": 70_000,
            "draws": 4,
            "draw_logprobs": True,
            "id_ranks": (69_999, 5, 300, 0),
        },
        "coarse_wide": {"top_k": 300, "token_count": 4096, "codec": Codec.preset("coarse", top_k=300)},
        "exact_draws": {"top_k": 6, "token_count": 500, "draws": 300, "codec": Codec.preset("exact", top_k=6)},
        # Format 2 only: every field that format 1 does not have, and one that no release knows.
        "all_fields": {"top_k": 4, "token_count": 300, "draws": 4, **ALL_FIELDS},
    }.items():
        _make(folder / name, **changes)
    # Format 2 only: images in rows and as files, under a header that names their placeholder.
    _make_images(folder / "images")


def _make(root: Path, *, top_k: int, token_count: int, draws: int = 0, **changes: object) -> None:
    rng = np.random.default_rng(top_k)
    fields = {"vocab_size": token_count + 64, "token_count": token_count, "kept_draws": draws, **changes}
    with tempfile.TemporaryDirectory() as folder:
        header = making.tiny_header(making.tiny_tokenizer(Path(folder)), top_k=top_k, draws=draws, **fields)
    store = Store(root)
    store.create("dataset.json", header.to_bytes())
    store.create(PLAN_NAME, plan_to_bytes([Unit(0, 0, 0, 3), Unit(1, 900, 3, 3)]))
    image = b"\x89PNG, nearly"
    store.put("media/cat.png", image)
    digest = hashlib.sha256(image).hexdigest()
    for unit in range(2):
        rows = [_row(rng, f"row-{unit}-{i}", header) for i in range(3 - unit)]
        rows[0] = replace(
            rows[0],
            metadata={"topic": "Ü", "n": [1, 2.5, None]},
            media=(
                MediaReference(position=0, type="image/png", sha256=digest, data=image),
                MediaReference(position=3, type="image/png", sha256=digest, path="media/cat.png"),
            ),
        )
        rejects = [Reject(5, "row-1-2", "too_long", "99 tokens")] * unit
        commit_unit(store, unit, rows=rows, rejects=rejects, header=header, environment={}, faithful_positions=4)
    seal(store)
    _write_expected(store, root)


def _make_images(root: Path) -> None:
    processor = {
        "name": "TinyProcessor",
        "settings_sha256": "5" * 64,
        "settings": {"image_token_id": 7, "size": {"longest_edge": 32}},
    }
    small, photo = image_bytes(1, size=(3, 2)), image_bytes(2, size=(12, 8), format="JPEG")
    about = {"license": "MIT", "processor": processor, "media_in_row_bytes": len(small)}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = making.tiny_tokenizer(Path(folder))
        header = making.tiny_header(tokenizer, top_k=4, token_count=300, vocab_size=300, about=about)
    store = Store(root)
    store.create("dataset.json", header.to_bytes())
    store.create(PLAN_NAME, plan_to_bytes([Unit(0, 0, 0, 2), Unit(1, 900, 2, 1)]))
    rng = np.random.default_rng(7)
    for unit, rows in enumerate(([[small, photo], []], [[photo, photo, small]])):
        made = []
        for number, images in enumerate(rows):
            places = [2 * n for n in range(len(images))]
            tokens = rng.integers(8, 300, 12, dtype=np.int32)
            tokens[places] = 7
            spans = np.array([[6, 8], [9, 11]], np.int32)
            probs = making.random_probs(rng, 4, header.token_count)
            targets = making.targets_of(probs, tokens[[7, 8, 10, 11]], top_k=4, draws=4, seed=unit)
            media = tuple(
                MediaReference(
                    position=place,
                    type="image/png" if content == small else "image/jpeg",
                    sha256=hashlib.sha256(content).hexdigest(),
                    data=content,
                )
                for place, content in zip(places, images, strict=True)
            )
            row_id = f"row-{unit}-{number}"
            made.append(CachedRow(sample_id=row_id, token_ids=tokens, target_spans=spans, targets=targets, media=media))
        commit_unit(store, unit, rows=made, rejects=[], header=header, environment={}, faithful_positions=2)
    seal(store)
    _write_expected(store, root)


def _write_expected(store: Store, root: Path) -> None:
    store.delete_folder("commits")
    dataset = open_dataset(root)
    header, expected = json.loads(dataset.header.to_bytes()), []
    for shard in dataset.shards:
        for row in pq.read_table(root / shard.file.name).to_pylist():
            facts = {"sample_id": row["sample_id"], "token_ids": row["token_ids"]}
            expected.append({**facts, "positions": decode_row(row, header)})
    (root.parent / f"{root.name}.expected.json").write_text(json.dumps(expected), encoding="utf-8")


def _row(rng: np.random.Generator, sample_id: str, header: DatasetHeader) -> CachedRow:
    tokens = rng.integers(0, header.token_count, 9, dtype=np.int32)
    spans = spans_from_mask([False, True, True, False, False, True, True, True, False])
    counts = rng.integers(1, header.top_k + 1, 5)
    targets = making.wide_targets(
        rng, counts, vocabulary=header.token_count, top_k=header.top_k, most_draws=header.draws, sharpness=5
    )
    if header.draw_logprobs:
        targets = replace(targets, draw_logprobs=np.linspace(-9, -4, targets.draw_ids.size, dtype=np.float32))
    # A label or two are among the kept ids.
    tokens[1 + 1] = targets.ids[1, 0]
    return CachedRow(sample_id=sample_id, token_ids=tokens, target_spans=spans, targets=targets)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
