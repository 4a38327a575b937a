"""Split: a row's part depends only on the seed and its sample id, and the parts make up the dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.tools.derive.merge import merge
from coldstill.tools.derive.split import parse_parts, part_of, split
from coldstill.tools.errors import InvalidRequest, NothingSelected, OutputNotApart, OutputTaken
from tests.tools.derive.parts import assert_equal_rows, assert_holds, frames, rich_dataset, storage_kls

HALVES = {"train": 0.5, "test": 0.5}


def test_the_parts_are_the_rows_of_the_dataset_in_order(source: Dataset, tmp_path: Path) -> None:
    shares = {"train": 0.6, "dev": 0.2, "test": 0.2}
    parts = split(source.store.url, tmp_path / "parts", parts=shares, progress=False)
    assert list(parts) == list(shares)
    for name, part in parts.items():
        wanted = [row for row in source.rows() if part_of(row.sample_id, parts=shares) == name]
        assert wanted
        assert_equal_rows(list(part.rows()), wanted)
        assert part.store.url == str(tmp_path / "parts" / name)
        assert part.header == source.header
        assert (part.manifest.rejected, part.manifest.derived_from) == (0, (source.dataset_id,))
        assert_holds(part)
    assert sum(len(part) for part in parts.values()) == len(source)


def test_a_merge_of_the_parts_of_a_split_has_the_same_rows(source: Dataset, tmp_path: Path) -> None:
    parts = split(source.store.url, tmp_path / "parts", parts=HALVES, progress=False)
    merged = merge([part.store.url for part in parts.values()], tmp_path / "merged", progress=False)
    by_id = {row.sample_id: row for row in merged.rows()}
    assert len(merged) == len(by_id) == len(source)
    assert_equal_rows([by_id[row.sample_id] for row in source.rows()], list(source.rows()))
    assert frames(merged) == frames(source)
    assert storage_kls(merged) == storage_kls(source)
    assert (merged.manifest.tokens, merged.manifest.targets) == (source.manifest.tokens, source.manifest.targets)
    assert_holds(merged)


def test_part_of_a_row_depends_on_its_id_alone(
    header: DatasetHeader, tokenizer_folder: Path, source: Dataset, tmp_path: Path
) -> None:
    grown = rich_dataset(tmp_path / "grown", header, tokenizer_folder, shards=(7, 7, 8, 8, 8, 8, 8, 8, 8))
    before = split(source.store.url, tmp_path / "before", parts=HALVES, progress=False)
    after = split(grown.store.url, tmp_path / "after", parts=HALVES, progress=False)
    for name in HALVES:
        ids = {row.sample_id for row in before[name].rows()}
        assert ids <= {row.sample_id for row in after[name].rows()}


def test_equal_ids_are_in_the_same_part(header: DatasetHeader, tokenizer_folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        rich_dataset(tmp_path / str(seed), header, tokenizer_folder, shards=(8, 8), seed=0, image=b"cat%d" % seed)
    twice = merge([tmp_path / "0", tmp_path / "1"], tmp_path / "twice", progress=False)
    parts = split(twice.store.url, tmp_path / "parts", parts=HALVES, progress=False)
    ids = [{row.sample_id for row in part.rows()} for part in parts.values()]
    assert not ids[0] & ids[1]
    assert sum(map(len, ids)) * 2 == len(twice)


def test_the_seed_changes_the_split(source: Dataset, tmp_path: Path) -> None:
    ids = []
    for seed in (0, 1):
        made = split(source.store.url, tmp_path / str(seed), parts=HALVES, seed=seed, progress=False)
        ids.append({row.sample_id for row in made["test"].rows()})
    assert ids[0] != ids[1]


@given(st.integers(-5, 1 << 40), st.floats(0.01, 0.99))
def test_shares_are_kept(seed: int, share: float) -> None:
    parts = {"a": share, "b": 1 - share}
    found = [part_of(f"row-{number}", parts=parts, seed=seed) for number in range(2000)]
    assert abs(found.count("a") / 2000 - share) < 0.07  # six standard deviations at most
    reordered = {"b": 1 - share, "a": share}
    assert found == [part_of(f"row-{number}", parts=reordered, seed=seed) for number in range(2000)]


def test_a_larger_share_keeps_the_rows_of_the_smaller_one() -> None:
    rows = [f"row-{number}" for number in range(2000)]
    small, large = (
        {row for row in rows if part_of(row, parts={"test": share, "train": 1 - share}) == "test"}
        for share in (0.05, 0.1)
    )
    assert small < large


def test_parts_of_earlier_releases_stay() -> None:
    parts = {"train": 0.7, "test": 0.3}
    found = [n for n in range(40) if part_of(f"chat-{n}", parts=parts, seed=1) == "test"]
    assert found == [0, 5, 8, 10, 15, 16, 22, 23, 24, 25, 31, 33, 38, 39]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least two"),
        ({"train": 1.0}, "at least two"),
        ({"train": 0.5, "test": 0.4}, "a sum of 0.9"),
        ({"train": 1.0, "test": 0.0}, "between 0 and 1"),
        ({"train": float("nan"), "test": 0.5}, "between 0 and 1"),
        ({"../train": 0.5, "test": 0.5}, "name of a part"),
        ({"": 0.5, "test": 0.5}, "name of a part"),
        ({"..": 0.5, "test": 0.5}, "name of a part"),
        ({"Test": 0.2, "test": 0.3, "train": 0.5}, "more than case"),
    ],
)
def test_parts_that_make_no_sense_are_refused(
    source: Dataset, tmp_path: Path, parts: dict[str, float], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        split(source.store.url, tmp_path / "parts", parts=parts, progress=False)


def test_a_part_without_rows_is_refused_before_any_is_written(source: Dataset, tmp_path: Path) -> None:
    with pytest.raises(NothingSelected, match="part 'test'"):
        split(source.store.url, tmp_path / "parts", parts={"train": 1 - 1e-6, "test": 1e-6}, progress=False)
    assert not (tmp_path / "parts").exists()


def test_another_split_of_the_same_output_is_refused(source: Dataset, tmp_path: Path) -> None:
    split(source.store.url, tmp_path / "parts", parts=HALVES, progress=False)
    with pytest.raises(OutputTaken, match=r"seed\n  found:  0\n  wanted: 1"):
        split(source.store.url, tmp_path / "parts", parts=HALVES, seed=1, progress=False)


def test_parts_inside_the_source_are_refused(tiny_dataset: Path) -> None:
    before = open_dataset(tiny_dataset).dataset_id
    with pytest.raises(OutputNotApart):
        split(tiny_dataset, tiny_dataset, parts=HALVES, progress=False)
    assert not (tiny_dataset / "train").exists()
    assert open_dataset(tiny_dataset).dataset_id == before


def test_parts_are_read_from_words() -> None:
    assert parse_parts(["train=0.95", "test=.05"]) == {"train": 0.95, "test": 0.05}


@pytest.mark.parametrize("words", [["train"], ["train=most"], ["a=0.5", "a=0.5"]])
def test_words_that_are_no_parts_have_a_name(words: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="for instance"):
        parse_parts(words)
