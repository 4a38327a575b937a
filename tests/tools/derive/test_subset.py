"""Subset takes the rows that a slow reference takes, unchanged, in shards that are not nearly empty."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.errors import FileMissing
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.shard.layout import MAX_GROUP_BYTES, MAX_GROUP_ROWS
from coldstill.tools.derive.subset import parse_rows, subset
from coldstill.tools.errors import InvalidRequest, NothingSelected
from tests import making
from tests.tools.derive.parts import (
    assert_equal_rows,
    assert_holds,
    frames,
    media_name,
    rich_dataset,
    rich_row,
    storage_kls,
)


@pytest.mark.parametrize(
    ("filters", "holds"),
    [
        (["tokens <= 12"], lambda row: row.token_ids.size <= 12),
        (["targets > 6"], lambda row: row.targets.positions > 6),
        (["metadata.topic == math"], lambda row: row.metadata["topic"] == "math"),
        (['metadata.topic == "Ü"'], lambda row: row.metadata["topic"] == "Ü"),
        (["metadata.deep.odd == true", "tokens > 8"], lambda row: row.metadata["n"] % 2 and row.token_ids.size > 8),
        (["sample_id ~ ^chat-0-1.$"], lambda row: 10 <= row.metadata["n"] < 20),
        (["metadata.rare == null"], lambda row: "rare" in row.metadata),
        (["metadata.n < 1000"], lambda row: True),
        (["metadata.n >= 7"], lambda row: row.metadata["n"] >= 7),
    ],
)
def test_a_subset_has_the_rows_for_which_all_filters_hold(
    source: Dataset, tmp_path: Path, filters: list[str], holds: Callable[[CachedRow], bool]
) -> None:
    wanted = [row for row in source.rows() if holds(row)]
    found = subset(source.store.url, tmp_path / "subset", filters=filters, progress=False)
    assert_equal_rows(list(found.rows()), wanted)
    kept = {row.sample_id for row in wanted}
    assert frames(found) == {name: stored for name, stored in frames(source).items() if name in kept}
    assert storage_kls(found) == {key: kl for key, kl in storage_kls(source).items() if key[0] in kept}
    assert found.manifest.tokens == sum(row.token_ids.size for row in wanted)
    assert found.manifest.targets == sum(row.targets.positions for row in wanted)
    assert (found.manifest.rejected, found.manifest.derived_from) == (0, (source.dataset_id,))
    assert found.header == source.header
    assert_holds(found)


@pytest.mark.parametrize(
    ("rows", "limit", "wanted"),
    [
        ("0:10", None, range(10)),
        ("13:", None, range(13, 61)),
        (":9", None, range(9)),
        ("8:16", None, range(8, 16)),
        ("60:99", None, range(60, 61)),
        (None, 11, range(11)),
        ("5:50", 9, range(5, 14)),
        ("7:", 1, range(7, 8)),
    ],
)
def test_rows_and_limit_are_a_slice(
    source: Dataset, tmp_path: Path, rows: str | None, limit: int | None, wanted: range
) -> None:
    found = subset(source.store.url, tmp_path / "subset", rows=rows, limit=limit, progress=False)
    assert_equal_rows(list(found.rows()), list(source.rows(wanted.start, wanted.stop)))
    assert_holds(found)


def test_filters_rows_and_limit_go_together(source: Dataset, tmp_path: Path) -> None:
    odd = ["metadata.deep.odd == true"]
    found = subset(source.store.url, tmp_path / "subset", filters=odd, rows="2:40", limit=7, progress=False)
    assert [row.metadata["n"] for row in found.rows()] == [3, 5, 7, 9, 11, 13, 15]


def test_a_whole_shard_keeps_its_bytes(source: Dataset, tmp_path: Path) -> None:
    found = subset(source.store.url, tmp_path / "subset", filters=["metadata.n >= 5"], progress=False)
    assert [shard.rows for shard in found.shards] == [3, *[8] * 6, 5]
    assert [shard.file.sha256 for shard in found.shards[1:]] == [shard.file.sha256 for shard in source.shards[1:]]


def test_small_remains_are_joined_up_to_a_unit(source: Dataset, tmp_path: Path) -> None:
    found = subset(source.store.url, tmp_path / "subset", filters=["metadata.topic == law"], progress=False)
    assert [shard.rows for shard in found.shards] == [8, 8, 4]
    metadata = [pq.read_metadata(tmp_path / "subset" / shard.file.name) for shard in found.shards]
    assert [each.num_row_groups for each in metadata] == [1, 1, 1]


def test_row_groups_stay_within_the_bounds_of_the_format(
    header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path
) -> None:
    heavy = rich_dataset(
        tmp_path / "heavy", header, tokenizer_folder, shards=(8,), inline=bytes(range(256)) * (3 << 20 >> 8)
    )
    wide = header.model_copy(update={"rows_per_unit": 4000})
    light = rich_dataset(tmp_path / "light", wide, tokenizer_folder, shards=(1100, 10, 7))
    for source, filters, groups in (
        (heavy, ["metadata.deep.odd == true"], [2, 2]),
        (light, ["metadata.n != 3", "metadata.n != 1105"], [1023, 85, 7]),
    ):
        found = subset(source.store.url, tmp_path / f"of-{source.dataset_id}", filters=filters, progress=False)
        metadata = [pq.read_metadata(Path(found.store.root, shard.file.name)) for shard in found.shards]
        sizes = [each.row_group(group) for each in metadata for group in range(each.num_row_groups)]
        assert [group.num_rows for group in sizes] == groups
        assert max(group.num_rows for group in sizes) <= MAX_GROUP_ROWS
        assert max(group.total_byte_size for group in sizes) <= MAX_GROUP_BYTES
        assert_holds(found)


def test_only_media_of_taken_rows_are_carried(source: Dataset, tmp_path: Path) -> None:
    for name, filters, wanted in (
        ("with", ["metadata.n >= 4"], {media_name(b"cat")}),
        ("without", ["metadata.deep.odd == true"], set()),
    ):
        found = subset(source.store.url, tmp_path / name, filters=filters, progress=False)
        assert {file.name for file in found.manifest.files if file.name.startswith("media/")} == wanted
        assert_holds(found)


def test_a_medium_that_the_source_lacks_has_a_name(
    header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path
) -> None:
    store = making.begin_dataset(tmp_path / "lacking", header, tokenizer_folder, [1])
    row = rich_row(np.random.default_rng(0), "a", 0, image=b"lost")
    store.put(media_name(b"lost"), b"lost")
    commit_unit(store, 0, rows=[row], rejects=[], header=header, environment={})
    manifest = seal(store)
    files = tuple(file for file in manifest.files if file.name != media_name(b"lost"))
    store.put(MANIFEST_NAME, manifest.model_copy(update={"files": files}).to_bytes())
    with pytest.raises(FileMissing, match=r"media/lost\.png"):
        subset(store.url, tmp_path / "subset", progress=False)


def test_an_empty_result_is_an_error_and_leaves_nothing(source: Dataset, tmp_path: Path) -> None:
    with pytest.raises(NothingSelected, match="loosen the filters"):
        subset(source.store.url, tmp_path / "subset", filters=["metadata.absent != 1"], progress=False)
    assert not (tmp_path / "subset").exists()
    subset(source.store.url, tmp_path / "subset", filters=["metadata.n == 1"], progress=False)


@pytest.mark.parametrize("text", ["", "5", "a:b", "-5:", "1:2:3", "5:5", "9:3", "100:", "1" * 19 + ":", "²:9"])
def test_rows_that_make_no_sense_are_refused(source: Dataset, tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="rows"):
        subset(source.store.url, tmp_path / "subset", rows=text, progress=False)


def test_a_limit_of_nothing_is_refused(source: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="limit"):
        subset(source.store.url, tmp_path / "subset", limit=0, progress=False)


def test_either_end_of_rows_may_be_left_out() -> None:
    assert [parse_rows(text, count=9) for text in (":", "2:", ":3", " 1 : 99 ")] == [
        range(9),
        range(2, 9),
        range(3),
        range(1, 9),
    ]


def test_the_shard_names_hold_their_digests(source: Dataset, tmp_path: Path) -> None:
    found = subset(source.store.url, tmp_path / "subset", filters=["metadata.topic == law"], progress=False)
    for shard in found.shards:
        digest = hashlib.sha256(found.store.read(shard.file.name)).hexdigest()
        assert shard.file.name == f"shards/{shard.unit:06d}-{digest[:12]}.parquet"
