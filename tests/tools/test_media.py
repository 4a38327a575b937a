"""Each tool carries the images of the rows that it takes, in the rows and as files, and nothing else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from coldstill.storage_schema import media
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import HeaderMismatch, StorageFailed, TooManyMedia
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import FileRecord
from coldstill.tools.derive.merge import merge
from coldstill.tools.derive.split import split
from coldstill.tools.derive.subset import subset
from coldstill.tools.errors import NotExportable
from coldstill.tools.exchange.export import export_axolotl, export_plain
from coldstill.tools.pull import pull
from coldstill.tools.push import _batches, push
from coldstill.tools.upgrade import upgrade
from coldstill.tools.verify import verify
from tests.tools.vision_data import (
    CAT,
    DOG,
    PHOTO,
    PLACEHOLDER,
    SMALL,
    images_of,
    media_files,
    name_of,
    vision_dataset,
    vision_header,
)

UNITS = [[[SMALL, PHOTO], [], [CAT]], [[PHOTO, PHOTO, SMALL], [DOG, SMALL]], [[], [SMALL]]]


@pytest.fixture
def source(tmp_path: Path, tokenizer_folder: Path) -> Dataset:
    return vision_dataset(tmp_path / "source", tokenizer_folder, UNITS)


def assert_holds(dataset: Dataset) -> None:
    assert verify(dataset.store.url, deep=True, progress=False) == []


def test_the_dataset_stores_each_image_once(source: Dataset) -> None:
    wanted = {f"0-{unit}-{row}": images for unit, rows in enumerate(UNITS) for row, images in enumerate(rows)}
    assert images_of(source) == wanted
    assert media_files(source) == {name_of(PHOTO), name_of(CAT), name_of(DOG)}
    assert_holds(source)


def test_a_merge_has_the_images_of_all_sources_each_once(
    source: Dataset, tmp_path: Path, tokenizer_folder: Path
) -> None:
    other = vision_dataset(tmp_path / "other", tokenizer_folder, [[[PHOTO], [DOG, DOG]]], seed=5)
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    assert images_of(merged) == {**images_of(source), **images_of(other)}
    assert media_files(merged) == {name_of(PHOTO), name_of(CAT), name_of(DOG)}
    assert merged.header.about.processor == source.header.about.processor
    assert_holds(merged)


def test_datasets_of_different_processors_do_not_merge(source: Dataset, tmp_path: Path, tokenizer_folder: Path) -> None:
    settings = {"image_token_id": PLACEHOLDER, "size": {"longest_edge": 32}, "do_image_splitting": True}
    processor = {"name": "SomeProcessor", "settings_sha256": "1" * 64, "settings": settings}
    header = vision_header(tokenizer_folder, about={"processor": processor})
    other = vision_dataset(tmp_path / "other", tokenizer_folder, [[[PHOTO]]], header=header, seed=5)
    for roots in ([source, other], [other, source]):
        with pytest.raises(HeaderMismatch, match=r"about\.processor\.settings\.size\.longest_edge"):
            merge([one.store.url for one in roots], tmp_path / "merged", progress=False)


@pytest.mark.parametrize("text_first", [True, False])
def test_images_and_text_merge_and_how_images_were_placed_may_differ(
    source: Dataset, tmp_path: Path, tokenizer_folder: Path, text_first: bool
) -> None:
    text = vision_header(tokenizer_folder, about={"processor": None, "media_in_row_bytes": None})
    text_data = vision_dataset(tmp_path / "text", tokenizer_folder, [[[], []]], header=text, seed=5)
    whole = vision_header(tokenizer_folder, about={"media_in_row_bytes": 1 << 20})
    in_rows = vision_dataset(tmp_path / "in_rows", tokenizer_folder, [[[PHOTO]]], header=whole, seed=6)
    sources = [text_data, source, in_rows] if text_first else [in_rows, source, text_data]
    merged = merge([one.store.url for one in sources], tmp_path / "merged", progress=False)
    assert merged.header.about.processor == source.header.about.processor
    assert merged.header.about.media_in_row_bytes is None
    assert images_of(merged) == {name: found for one in sources for name, found in images_of(one).items()}
    assert_holds(merged)


def test_a_subset_has_the_images_of_its_rows_alone(source: Dataset, tmp_path: Path) -> None:
    for filters, wanted in (
        (["sample_id == 0-1-1"], {name_of(DOG)}),
        (["media == 0"], set()),
        (["media >= 2"], {name_of(PHOTO), name_of(DOG)}),
    ):
        found = subset(source.store.url, tmp_path / filters[0], filters=filters, progress=False)
        assert media_files(found) == wanted
        assert images_of(found).items() <= images_of(source).items()
        assert_holds(found)
    assert all(images_of(open_dataset(tmp_path / "media >= 2")).values())
    assert len(open_dataset(tmp_path / "media == 0")) == 2


def test_the_parts_of_a_split_have_their_images(source: Dataset, tmp_path: Path) -> None:
    parts = split(source.store.url, tmp_path / "parts", parts={"a": 0.5, "b": 0.5}, progress=False)
    together = {}
    for part in parts.values():
        assert_holds(part)
        together |= images_of(part)
        large = {name_of(image) for images in images_of(part).values() for image in images if image != SMALL}
        assert media_files(part) == large
    assert together == images_of(source)


def test_a_merge_that_was_interrupted_resumes(
    source: Dataset, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = vision_dataset(tmp_path / "other", tokenizer_folder, [[[DOG]], [[CAT]]], seed=5)
    roots = [source.store.url, other.store.url]
    whole = merge(roots, tmp_path / "whole", progress=False)
    real, left = Store.put, [0]

    def put(store: Store, name: str, data: bytes) -> None:
        if left[0] == 0:
            raise StorageFailed("the power")
        left[0] -= 1
        real(store, name, data)

    monkeypatch.setattr(Store, "put", put)
    for writes in range(1, 8):  # a later attempt gets further, and none starts again
        left[0] = writes
        with suppress(StorageFailed):
            merged = merge(roots, tmp_path / "merged", progress=False)
            break
    assert merged.dataset_id == whole.dataset_id
    assert images_of(merged) == images_of(whole)


def test_a_merge_with_more_files_than_a_manifest_lists_ends_before_it_writes(
    source: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "MAX_MEDIA_FILES", 2)
    with pytest.raises(TooManyMedia, match="3 files in media/"):
        merge([source.store.url], tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


def test_a_copy_has_all_images_and_a_lost_one_is_copied_again(source: Dataset, tmp_path: Path) -> None:
    push(source.store.url, f"memory://{tmp_path.name}/pushed", progress=False)
    pull(f"memory://{tmp_path.name}/pushed", tmp_path / "pulled", progress=False)
    pulled = open_dataset(tmp_path / "pulled")
    assert pulled.dataset_id == source.dataset_id
    assert images_of(pulled) == images_of(source)
    assert_holds(pulled)
    (tmp_path / "pulled" / name_of(PHOTO)).unlink()
    (tmp_path / "pulled" / name_of(CAT)).write_bytes(CAT[::-1])
    assert pull(source.store.url, tmp_path / "pulled", progress=False).files == 2
    assert images_of(open_dataset(tmp_path / "pulled")) == images_of(source)


def test_a_commit_on_the_hub_has_more_media_files_than_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldstill.tools.push.COMMIT_FILES", 2)
    monkeypatch.setattr("coldstill.tools.push.COMMIT_MEDIA_FILES", 5)
    names = [*(f"media/{n}" for n in range(12)), *(f"shards/{n}" for n in range(5))]
    batches = list(_batches([FileRecord(name=name, bytes=1, sha256="0" * 64) for name in names]))
    assert [file.name for batch in batches for file in batch] == names
    assert [len(batch) for batch in batches] == [5, 5, 2, 2, 2, 1]


def test_an_upgrade_keeps_the_images(tmp_path: Path, tokenizer_folder: Path) -> None:
    header = vision_header(tokenizer_folder, about={"processor": None, "media_in_row_bytes": None})
    old = header.model_copy(update={"format_version": 1})
    made = vision_dataset(tmp_path / "old", tokenizer_folder, UNITS, header=old)
    before = images_of(made)
    upgraded = upgrade(tmp_path / "old")
    assert upgraded.header.format_version == 2
    assert images_of(upgraded) == before
    assert_holds(upgraded)


def test_an_export_has_the_images_too(source: Dataset, tmp_path: Path) -> None:
    names = export_plain(source.store.url, tmp_path / "plain", progress=False)
    found = {}
    for name in names:
        for row in pq.read_table(tmp_path / "plain" / name).to_pylist():
            contents = [item["data"] or (tmp_path / "plain" / item["path"]).read_bytes() for item in row["media"]]
            found[row["sample_id"]] = contents
    assert found == images_of(source)
    with pytest.raises(NotExportable, match="media == 0"):
        export_axolotl(source.store.url, tmp_path / "axolotl", progress=False)
    subset(source.store.url, tmp_path / "text", filters=["media == 0"], progress=False)
    assert export_axolotl(tmp_path / "text", tmp_path / "of_text", progress=False)
