"""Laws of sources with images: each format and each way of reading it gives the same bytes, staged or in place."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources import parquet_rows
from coldstill.pipeline.sources.files import SourceRow, json_text, parse_row
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.sources.source import open_source, read_index
from coldstill.pipeline.teachers.protocol import TokenSequence
from coldstill.storage_schema.commits import Reject
from coldstill.storage_schema.store import Store
from tests.pipeline.sources import templates
from tests.vision import idefics3_processor, image_bytes, vision_tokenizer

PROCESSOR = idefics3_processor(vision_tokenizer())
ROWS = 5


def _rows() -> list[dict[str, Any]]:
    """Row `n` has `n` images."""
    return [
        {
            "id": f"row {n}",
            "messages": [
                {"role": "user", "content": "<image>" * n + f"what are these {n}?"},
                {"role": "assistant", "content": "yes"},
            ],
            "images": [{"bytes": image_bytes(n * 10 + i), "path": f"{n}-{i}.png"} for i in range(n)],
            "day": f"day {n}",
        }
        for n in range(ROWS)
    ]


def _parquet(folder: Path) -> SourceConfig:
    pq.write_table(pa.Table.from_pylist(_rows()), folder / "rows.parquet", row_group_size=2)
    return SourceConfig(path=str(folder / "rows.parquet"))


def _hub(folder: Path) -> SourceConfig:
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
            "day": datasets.Value("string"),
        }
    )
    (folder / "data").mkdir()
    datasets.Dataset.from_list(_rows(), features=features).to_parquet(str(folder / "data" / "train.parquet"))
    return SourceConfig(dataset=str(folder / "data"))


def _saved(folder: Path) -> SourceConfig:
    import datasets

    table = datasets.Dataset.from_parquet(str(folder / "data" / "train.parquet"), cache_dir=str(folder / "cache"))
    table.save_to_disk(str(folder / "saved"))
    return SourceConfig(dataset=str(folder / "saved"))


def _saved_splits(folder: Path) -> SourceConfig:
    import datasets

    saved = datasets.load_from_disk(str(_saved(folder).dataset))
    splits = datasets.DatasetDict({"test": saved, "train": saved.select([0])})
    splits.save_to_disk(str(folder / "splits"))
    return SourceConfig(dataset=str(folder / "splits"), split="test")


def _files(folder: Path) -> list[dict[str, Any]]:
    """The rows with their images as files beside them."""
    rows = _rows()
    for row in rows:
        for image in row["images"]:
            (folder / image["path"]).write_bytes(image.pop("bytes"))
    return rows


def _lines(folder: Path) -> SourceConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _files(folder)))
    return SourceConfig(path=str(folder / "rows.jsonl"))


def _compressed(folder: Path) -> SourceConfig:
    text = "".join(json.dumps(row) + "\n" for row in _files(folder))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return SourceConfig(path=str(folder / "rows.jsonl.gz"))


SOURCES = {
    "Parquet": _parquet,
    "datasets": _hub,
    "save_to_disk": lambda folder: (_hub(folder), _saved(folder))[1],
    "save_to_disk of splits": lambda folder: (_hub(folder), _saved_splits(folder))[1],
    "JSON Lines": _lines,
    "compressed": _compressed,
}


@pytest.mark.parametrize("is_wide", [False, True], ids=["", "in wide row groups"])
@pytest.mark.parametrize("make", SOURCES.values(), ids=list(SOURCES))
def test_every_source_gives_the_images_bytes_before_and_after_its_plan(
    make: Any, is_wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_wide:
        monkeypatch.setattr(parquet_rows, "_WIDE_BYTES", 1)
    config, store = make(tmp_path), Store(tmp_path / "dataset")
    maker = SequenceMaker(PROCESSOR.tokenizer, source=config, max_length=512, processor=PROCESSOR)
    source = open_source(config, store)
    before = list(maker.sequences(source.head(ROWS)))
    plan = source.plan(2)
    after = [made for unit in plan for made in maker.sequences(source.read(unit))]
    later = open_source(config, store)
    assert later.fingerprint == source.fingerprint
    again = [made for unit in plan for made in maker.sequences(later.read(unit))]
    for n, versions in enumerate(zip(before, after, again, strict=True)):
        for made in versions:
            assert isinstance(made, TokenSequence), made
            assert made.sample_id == f"row {n}"
            assert made.metadata == {"day": f"day {n}"}
            assert [item.data for item in made.media] == [image_bytes(n * 10 + i) for i in range(n)]
            assert made.token_ids.tolist() == versions[0].token_ids.tolist()  # type: ignore[union-attr]


def test_a_staged_source_holds_bytes_as_bytes_and_all_else_as_text() -> None:
    columns = {"data": b"\x00\xff", "inner": [{"bytes": b""}], "text": "a", "number": 1.5, "none": None}
    text = json_text({**columns, "day": Path("x")})
    assert parse_row(0, text).columns == {**columns, "day": "x"}


@pytest.mark.parametrize("value", ["no base64!", 7, None, {"coldstill:bytes": "AA=="}])
def test_an_object_of_a_stranger_that_looks_like_staged_bytes_harms_nothing(value: object) -> None:
    row = parse_row(0, json.dumps({"a": {"coldstill:bytes": value}, "b": "ok"}).encode())
    assert row.columns is not None
    assert row.columns["b"] == "ok"
    assert parse_row(0, json.dumps({"coldstill:bytes": "AA=="}).encode()).columns is None


def test_the_digest_of_a_dataset_is_the_one_of_earlier_releases(tmp_path: Path) -> None:
    """sha256 of the rows as JSON Lines, with values that JSON cannot hold as Python's text."""
    rows = [{"id": f"{n}", "text": "a text", "raw": bytes([n, 255])} for n in range(3)]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train.parquet")
    store = Store(tmp_path / "dataset")
    config = SourceConfig(dataset=str(tmp_path / "data"))
    open_source(config, store).plan(2)
    lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    index = read_index(store)
    assert index is not None
    assert index.sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_a_teacher_of_text_refuses_rows_that_show_images_and_reads_the_others(tmp_path: Path) -> None:
    """Its answers would be about what it was never shown. Images that no text shows are metadata, without bytes."""
    config = _hub(tmp_path)
    maker = SequenceMaker(templates.tokenizer(templates.QWEN25), source=config, max_length=512)
    made = list(maker.sequences(open_source(config).rows()))
    assert isinstance(made[0], TokenSequence)
    assert {each.reason for each in made[1:] if isinstance(each, Reject)} == {"bad_images"}
    assert len(made) == ROWS
    rows = _rows()
    rows[2]["messages"][0]["content"] = "what is said of these?"
    two = maker.make(SourceRow(2, rows[2]))
    assert isinstance(two, TokenSequence)
    assert two.media == ()
    assert two.metadata == {
        "day": "day 2",
        "images": [{"bytes": f"{len(image_bytes(20 + i))} bytes", "path": f"2-{i}.png"} for i in range(2)],
    }
