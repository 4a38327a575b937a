"""Datasets with everything that merge, split and subset must copy, and slow, plain views to compare them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from coldstill.storage_schema.codec import STREAMS
from coldstill.storage_schema.commits import Reject, commit_unit
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.faithfulness import storage_kl
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import CachedRow, MediaReference
from coldstill.tools.verify import verify
from tests import making

TOPICS = ("math", "law", "Ü")


def rich_row(
    rng: np.random.Generator, sample_id: str, number: int, *, image: bytes, content: bytes = b"", inline: bytes = b""
) -> CachedRow:
    """A random row with nested metadata; every fourth refers to the media file of `image`, see `rich_dataset`."""
    row = making.random_row(rng, sample_id)
    metadata = {"topic": TOPICS[number % 3], "n": number, "deep": {"odd": bool(number % 2), "score": number / 2}}
    if number % 5 == 0:
        metadata["rare"] = None
    media = []
    if number % 4 == 0:
        digest = hashlib.sha256(content or image).hexdigest()
        media.append(MediaReference(position=0, type="image/png", sha256=digest, path=media_name(image)))
    if inline:
        digest = hashlib.sha256(inline).hexdigest()
        media.append(MediaReference(position=1, type="image/png", sha256=digest, data=inline))
    return dataclasses.replace(row, metadata=metadata, media=tuple(media))


def media_name(image: bytes) -> str:
    """The media file of an image."""
    return f"media/{image.decode()}.png"


def rich_dataset(
    root: Path | str,
    header: DatasetHeader,
    tokenizer: Path,
    *,
    shards: tuple[int, ...] = (8, 8, 5),
    seed: int = 0,
    image: bytes = b"cat",
    content: bytes = b"",
    inline: bytes = b"",
) -> Dataset:
    """A sealed dataset with metadata, rejects (one in every odd unit), media files and a faithfulness sample.

    The media file of `image` has its bytes, or `content`; `inline` is a medium in each row.
    """
    rng = np.random.default_rng(seed)
    rejected = [unit % 2 for unit in range(len(shards))]
    units = [rows + more for rows, more in zip(shards, rejected, strict=True)]
    store = making.begin_dataset(root, header, tokenizer, units)
    store.put(media_name(image), content or image)
    store.put(media_name(b"unused-" + image), b"no row refers to it")
    number = 0
    for unit, count in enumerate(shards):
        rows = []
        for _ in range(count):
            row_id = f"chat-{seed}-{number}"
            rows.append(rich_row(rng, row_id, number, image=image, content=content, inline=inline))
            number += 1
        rejects = [Reject(number, f"bad-{seed}-{unit}", "too_long", "99 tokens")] * rejected[unit]
        commit_unit(store, unit, rows=rows, rejects=rejects, header=header, environment={}, faithful_positions=9)
    seal(store)
    return open_dataset(root)


def assert_equal_rows(found: list[CachedRow], wanted: list[CachedRow]) -> None:
    """Rows that are equal in every value."""
    assert [row.sample_id for row in found] == [row.sample_id for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.target_spans, other.target_spans)
        assert (one.metadata, one.media) == (other.metadata, other.media)
        for name in ("ids", "logprobs", "counts", "log_tail", "label_logprob", "draw_ids", "draw_counts"):
            np.testing.assert_array_equal(getattr(one.targets, name), getattr(other.targets, name))


def frames(dataset: Dataset) -> dict[str, tuple[bytes, ...]]:
    """The stored bytes of all streams, by sample id, read by plain Parquet."""
    stored = {}
    for shard in dataset.shards:
        for record in pq.read_table(Path(dataset.store.root, shard.file.name)).to_pylist():
            stored[record["sample_id"]] = tuple(record[name] for name in STREAMS)
    return stored


def storage_kls(dataset: Dataset) -> dict[tuple[str, int], float]:
    """What storage cost at each position of the faithfulness sample, by sample id and target."""
    kls = {}
    for exact in dataset.faithfulness_sample():
        row = dataset.read_shard(exact.unit)[exact.row]
        kls[row.sample_id, exact.target] = storage_kl(exact, row.targets)
    return kls


def tree(root: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def assert_holds(dataset: Dataset) -> None:
    """A dataset that `verify --deep` has nothing to say about."""
    assert verify(dataset.store.url, deep=True, progress=False) == []
