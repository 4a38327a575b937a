"""Merge: all rows, rejects, media and samples of the sources, in order, with no frame decoded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from coldstill.storage_schema.commits import REJECTS_FOLDER
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import (
    DatasetNotFound,
    DatasetNotSealed,
    HeaderMismatch,
    ShardDamaged,
    TokenizerMismatch,
)
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import RowWriter, TeacherPrompt
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes
from coldstill.tools.derive import sources
from coldstill.tools.derive.merge import merge
from coldstill.tools.errors import InvalidRequest, MediaClash, NothingSelected
from tests import making
from tests.tools.derive.parts import (
    assert_equal_rows,
    assert_holds,
    frames,
    media_name,
    rich_dataset,
    storage_kls,
)


@pytest.fixture
def other_header(header: DatasetHeader) -> DatasetHeader:
    """The same teacher over another source, in larger units."""
    return header.model_copy(update={"source_sha256": "1" * 64, "rows_per_unit": 16})


@pytest.fixture
def other(tmp_path: Path, other_header: DatasetHeader, tokenizer_folder: Path) -> Dataset:
    return rich_dataset(tmp_path / "other", other_header, tokenizer_folder, shards=(16, 0, 3), seed=1, image=b"dog")


def test_a_merge_has_the_rows_of_its_sources_in_order(source: Dataset, other: Dataset, tmp_path: Path) -> None:
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    assert_equal_rows(list(merged.rows()), [*source.rows(), *other.rows()])
    assert merged.manifest.derived_from == (source.dataset_id, other.dataset_id)
    assert [shard.rows for shard in merged.shards] == [shard.rows for shard in (*source.shards, *other.shards)]
    assert merged.manifest.tokens == source.manifest.tokens + other.manifest.tokens
    assert merged.manifest.targets == source.manifest.targets + other.manifest.targets
    assert_holds(merged)


def test_frames_are_copied_not_re_encoded(source: Dataset, other: Dataset, tmp_path: Path) -> None:
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    assert merged.header != source.header
    assert frames(merged) == {**frames(source), **frames(other)}


def test_shards_under_one_header_keep_their_bytes(
    source: Dataset, header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path
) -> None:
    more = rich_dataset(tmp_path / "more", header, tokenizer_folder, seed=2)
    merged = merge([source.store.url, more.store.url], tmp_path / "merged", progress=False)
    digests = [shard.file.sha256 for shard in (*source.shards, *more.shards)]
    assert [shard.file.sha256 for shard in merged.shards] == digests
    assert merged.header == header
    assert_holds(merged)


def test_source_digests_are_joined_and_units_are_the_largest(source: Dataset, other: Dataset, tmp_path: Path) -> None:
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    assert merged.header.source_sha256 == hashlib.sha256(b"0" * 64 + b"\n" + b"1" * 64 + b"\n").hexdigest()
    assert merged.header.rows_per_unit == 16
    own = {"source_sha256": source.header.source_sha256, "rows_per_unit": source.header.rows_per_unit}
    assert merged.header.model_copy(update=own) == source.header


def test_rejects_go_with_their_unit(source: Dataset, other: Dataset, tmp_path: Path) -> None:
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    found = {file.name: merged.read_file(file) for file in merged.manifest.files if file.name.startswith("rejects/")}
    units = {int(name.removeprefix(f"{REJECTS_FOLDER}/")[:6]): json.loads(data) for name, data in found.items()}
    assert {unit: line["sample_id"] for unit, line in units.items()} == {
        **{unit: f"bad-0-{unit}" for unit in (1, 3, 5, 7)},
        len(source.shards) + 1: "bad-1-1",
    }
    assert merged.manifest.rejected == 5
    plan = plan_from_bytes(merged.store.read(PLAN_NAME), where=PLAN_NAME)
    assert [unit.rows for unit in plan] == [shard.rows + shard.rejected for shard in merged.shards]


def test_the_media_files_of_all_rows_are_carried(source: Dataset, other: Dataset, tmp_path: Path) -> None:
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    names = {file.name for file in merged.manifest.files if file.name.startswith("media/")}
    assert names == {media_name(image) for image in (b"cat", b"dog")}
    assert {f"media/{name}" for name in merged.store.names("media")} == names


def test_the_faithfulness_sample_is_carried(source: Dataset, other: Dataset, tmp_path: Path) -> None:
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    found = storage_kls(merged)
    assert len(found) > 80
    assert found == {**storage_kls(source), **storage_kls(other)}


def test_the_sample_of_many_sources_stays_small(
    source: Dataset, other: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_SAMPLE", 20)
    merged = merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    found, wanted = storage_kls(merged), {**storage_kls(source), **storage_kls(other)}
    assert len(found) == 20
    assert found.items() <= wanted.items()
    assert_holds(merged)


def test_a_merge_of_one_dataset_has_its_shards(source: Dataset, tmp_path: Path) -> None:
    merged = merge([source.store.url], tmp_path / "merged", progress=False)
    assert [shard.file for shard in merged.shards] == [shard.file for shard in source.shards]


def test_a_merge_reads_and_writes_object_stores(header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path) -> None:
    first = rich_dataset(f"memory://{tmp_path.name}/first", header, tokenizer_folder, shards=(3,), seed=3)
    second = rich_dataset(tmp_path / "second", header, tokenizer_folder, shards=(4,), seed=4)
    merged = merge([first.store.url, second.store.url], f"memory://{tmp_path.name}/merged", progress=False)
    assert_equal_rows(list(merged.rows()), [*first.rows(), *second.rows()])
    assert_holds(merged)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("teacher.name", {"teacher": {"name": "x", "weights_fingerprint": "2" * 64, "dtype": "a", "head_dtype": "b"}}),
        ("draw_seed", {"draw_seed": 5}),
        (r"about\.license", {"about": {"license": "MIT"}}),
        ("codec.name", {"codec": {"name": "float16", "fidelity": "exact", "mean_kl": 1e-6}}),
    ],
)
def test_headers_that_disagree_name_the_field(
    source: Dataset, tokenizer_folder: Path, tmp_path: Path, field: str, change: dict[str, object]
) -> None:
    header = DatasetHeader.model_validate({**source.header.model_dump(), **change})
    other = rich_dataset(tmp_path / "other", header, tokenizer_folder, shards=(2,))
    with pytest.raises(HeaderMismatch, match=rf"other/dataset\.json: {field}\n"):
        merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


def test_of_two_tables_of_frequent_ids_neither_is_printed_and_the_way_out_is_a_list_of_datasets(
    source: Dataset, tokenizer_folder: Path, tmp_path: Path
) -> None:
    table = tuple(reversed(range(source.header.token_count)))
    for name, field, change in (("a", "id_ranks", {}), ("b", "top_k", {"top_k": source.header.top_k + 1})):
        header = source.header.model_copy(update={"id_ranks": table, **change})
        other = rich_dataset(tmp_path / name, header, tokenizer_folder, shards=(2,))
        with pytest.raises(HeaderMismatch, match=rf"{name}/dataset\.json: {field}\n") as error:
            merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)
        assert len(str(error.value)) < 1000
        assert "dataset: [A, B]" in str(error.value)
        assert ("calibration_targets: 0" in str(error.value)) == (field == "id_ranks")


def test_a_tokenizer_that_is_not_the_headers_is_refused(source: Dataset, header: DatasetHeader, tmp_path: Path) -> None:
    wrong = making.tiny_tokenizer(tmp_path / "wrong", vocabulary=32)
    other = rich_dataset(tmp_path / "other", header, wrong, shards=(2,))
    with pytest.raises(TokenizerMismatch, match=r"other/tokenizer/tokenizer\.json"):
        merge([source.store.url, other.store.url], tmp_path / "merged", progress=False)


def test_media_of_one_name_must_be_one_file(
    source: Dataset, header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path
) -> None:
    rich_dataset(tmp_path / "other", header, tokenizer_folder, shards=(1,), seed=8, content=b"another cat")
    with pytest.raises(MediaClash, match=r"other/media/cat\.png"):
        merge([source.store.url, tmp_path / "other"], tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


def test_nothing_and_a_dataset_twice_are_refused(source: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no dataset"):
        merge([], tmp_path / "merged", progress=False)
    with pytest.raises(InvalidRequest, match="twice"):
        merge([source.store.url, source.store.url], tmp_path / "merged", progress=False)


def test_a_merge_without_rows_is_refused(header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path) -> None:
    rich_dataset(tmp_path / "empty", header, tokenizer_folder, shards=(0, 0))
    with pytest.raises(NothingSelected, match="0 rows"):
        merge([tmp_path / "empty"], tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


def test_only_sealed_datasets_are_sources(
    source: Dataset, header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path
) -> None:
    making.begin_dataset(tmp_path / "unsealed", header, tokenizer_folder, [2])
    with pytest.raises(DatasetNotSealed):
        merge([source.store.url, tmp_path / "unsealed"], tmp_path / "merged", progress=False)
    with pytest.raises(DatasetNotFound):
        merge([source.store.url, tmp_path / "absent"], tmp_path / "merged", progress=False)


def test_a_damaged_source_is_not_copied(tiny_dataset: Path, tmp_path: Path) -> None:
    shard = tiny_dataset / open_dataset(tiny_dataset).shards[1].file.name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardDamaged, match="sha256"):
        merge([tiny_dataset], tmp_path / "merged", progress=False)
    with pytest.raises(DatasetNotSealed):
        open_dataset(tmp_path / "merged")


_WRITER = RowWriter(name="student", weights_fingerprint="1" * 64, round=0)
_PROMPT = TeacherPrompt(kind="system", sha256="3" * 64)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("writer", {"writer": None}),
        ("writer", {"writer": _WRITER.model_copy(update={"weights_fingerprint": "2" * 64})}),
        ("writer", {"writer": _WRITER.model_copy(update={"round": 1})}),
        ("writer_prompt", {"writer_prompt": _PROMPT}),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_different_writers_are_not_merged(
    header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path, field: str, change: dict[str, object], turned: bool
) -> None:
    about = header.about.model_copy(update={"writer": _WRITER})
    roots = []
    for number, facts in enumerate((about, about.model_copy(update=change))):
        roots.append(tmp_path / f"part {number}")
        changed = header.model_copy(update={"about": facts})
        rich_dataset(roots[-1], changed, tokenizer_folder, shards=(2,), seed=number)
    with pytest.raises(HeaderMismatch, match=rf"dataset\.json: about\.{field}\n"):
        merge(roots[::-1] if turned else roots, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


def test_the_writer_and_its_prompt_stay_where_they_are_those_of_all_rows(
    header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path
) -> None:
    about = header.about.model_copy(update={"writer": _WRITER, "writer_prompt": _PROMPT})
    roots = [tmp_path / "one", tmp_path / "two"]
    for number, root in enumerate(roots):
        changed = header.model_copy(update={"about": about, "source_sha256": str(number) * 64})
        rich_dataset(root, changed, tokenizer_folder, shards=(2,), seed=number)
    merged = merge(roots, tmp_path / "merged", progress=False)
    assert (merged.header.about.writer, merged.header.about.writer_prompt) == (_WRITER, _PROMPT)
