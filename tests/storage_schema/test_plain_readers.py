"""Any Parquet reader can read the plain columns of a shard, without our code."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldstill.storage_schema.dataset import open_dataset

PLAIN = ("sample_id", "token_ids", "target_spans", "metadata")


def _rows(root: Path) -> list[tuple[object, ...]]:
    return [
        (row.sample_id, row.token_ids.tolist(), row.target_spans.reshape(-1).tolist())
        for row in open_dataset(root).rows()
    ]


def test_duckdb_sees_the_plain_columns(tiny_dataset: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    shards = f"{tiny_dataset}/shards/*.parquet"
    numbered = "read_parquet(?, filename = true, file_row_number = true)"
    with duckdb.connect() as connection:
        found = connection.execute(
            f"select sample_id, token_ids, target_spans from {numbered} order by filename, file_row_number", [shards]
        ).fetchall()
        (facts,) = connection.execute(
            "select sum(len(target_spans)) > 0, min(json_extract_string(metadata, '$.n')) from read_parquet(?)",
            [shards],
        ).fetchall()
    assert found == _rows(tiny_dataset)
    assert facts == (True, "row-0-0")


def test_datasets_sees_the_plain_columns(tiny_dataset: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tiny_dataset}/shards/*.parquet", split="train", cache_dir=str(tmp_path)
    )
    found = [(row["sample_id"], row["token_ids"], row["target_spans"]) for row in loaded.select_columns(list(PLAIN))]
    assert found == _rows(tiny_dataset)


def test_pandas_sees_the_plain_columns(tiny_dataset: Path) -> None:
    pandas = pytest.importorskip("pandas")
    first = sorted((tiny_dataset / "shards").iterdir())[0]
    frame = pandas.read_parquet(first, columns=list(PLAIN))
    assert [(a, b.tolist(), c.tolist()) for a, b, c, _ in frame.itertuples(index=False)] == _rows(tiny_dataset)[:8]
