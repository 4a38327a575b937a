"""The plain layout: DuckDB, pandas and `datasets` read the same values as our reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import MediaReference
from coldstill.storage_schema.shard import writer
from coldstill.tools.errors import OutputNotEmpty
from coldstill.tools.exchange import export
from coldstill.tools.exchange.export import export_axolotl, export_plain
from tests import making


def test_every_value_of_every_row_is_in_the_plain_form(tiny_dataset: Path, tmp_path: Path) -> None:
    names = export_plain(tiny_dataset, tmp_path / "out", progress=False)
    dataset = open_dataset(tiny_dataset)
    found = [row for name in names for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    for row, plain in zip(dataset.rows(), found, strict=True):
        targets = row.targets.by_probability()
        offsets = targets.draw_offsets
        assert plain["sample_id"] == row.sample_id
        assert plain["token_ids"] == row.token_ids.tolist()
        assert plain["target_positions"] == row.positions.tolist()
        assert plain["log_tail"] == targets.log_tail.tolist()
        assert plain["label_logprob"] == targets.label_logprob.tolist()
        for n, count in enumerate(targets.counts):
            assert plain["ids"][n] == targets.ids[n, :count].tolist()
            assert plain["logprobs"][n] == targets.logprobs[n, :count].tolist()
            assert plain["draw_ids"][n] == targets.draw_ids[offsets[n] : offsets[n + 1]].tolist()
            assert plain["logprobs"][n] == sorted(plain["logprobs"][n], reverse=True)
        assert plain["draw_logprobs"] is None
        assert plain["media"] == []


def test_duckdb_reads_probabilities_that_sum_to_1(tiny_dataset: Path, tmp_path: Path) -> None:
    export_plain(tiny_dataset, tmp_path / "out", progress=False)
    rows, worst = duckdb.sql(
        f"""
        WITH positions AS (
            SELECT sample_id, unnest(logprobs) AS logprobs, unnest(log_tail) AS log_tail
            FROM read_parquet('{tmp_path}/out/*.parquet'))
        SELECT count(DISTINCT sample_id),
               max(abs(list_sum([exp(x) for x in logprobs]) + exp(log_tail) - 1))
        FROM positions
        """
    ).fetchall()[0]
    assert rows == len(open_dataset(tiny_dataset))
    assert worst < 1e-5


def test_load_dataset_reads_the_folder(tiny_dataset: Path, tmp_path: Path) -> None:
    import datasets

    export_plain(tiny_dataset, tmp_path / "out", progress=False)
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    row = list(open_dataset(tiny_dataset).rows())[5]
    assert len(loaded) == 24
    assert loaded[5]["token_ids"] == row.token_ids.tolist()
    assert loaded[5]["ids"][0] == row.targets.by_probability().ids[0].tolist()


def test_pandas_reads_a_file(tiny_dataset: Path, tmp_path: Path) -> None:
    names = export_plain(tiny_dataset, tmp_path / "out", progress=False)
    frame = pandas.read_parquet(tmp_path / "out" / names[0])
    assert frame["log_tail"].map(len).tolist() == frame["target_positions"].map(len).tolist()


def test_files_are_bounded_compressed_and_carry_the_header(tmp_path: Path, tokenizer_folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [making.random_row(rng, f"row-{i}", length=60) for i in range(7)]
    header = making.tiny_header(tokenizer_folder)
    making.write_dataset(tmp_path / "in", [rows, [], rows[:1]], header=header, tokenizer=tokenizer_folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "GROUP_BYTES", 1)
        names = export_plain(tmp_path / "in", tmp_path / "out", file_bytes=1, progress=False)
    assert names == [*(f"000000-{part:03d}.parquet" for part in range(7)), "000002-000.parquet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    file = pq.ParquetFile(tmp_path / "out" / names[0])
    group = file.metadata.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}
    assert DatasetHeader.from_bytes(file.metadata.metadata[b"coldstill"], where="footer") == header


def test_log_probs_of_draws_and_images_are_exported_too(tmp_path: Path, tokenizer_folder: Path) -> None:
    rng = np.random.default_rng(0)
    row = making.random_row(rng, "a", length=20)
    probs = making.random_probs(rng, row.positions.size, making.VOCABULARY)
    targets = making.targets_of(probs, row.labels, top_k=8, draws=4, draw_logprobs=True)
    image = MediaReference(position=2, type="image/png", sha256=sha256(b"x").hexdigest(), data=b"x")
    header = making.tiny_header(tokenizer_folder, draw_logprobs=True)
    making.write_dataset(
        tmp_path / "in", [[replace(row, targets=targets, media=(image,))]], header=header, tokenizer=tokenizer_folder
    )
    export_plain(tmp_path / "in", tmp_path / "out", progress=False)
    found = pq.read_table(tmp_path / "out" / "000000-000.parquet").to_pylist()[0]
    stored = open_dataset(tmp_path / "in").read_shard(0)[0].targets
    assert np.concatenate([one or [] for one in found["draw_logprobs"]]).tolist() == stored.draw_logprobs.tolist()
    assert found["media"] == [{"position": 2, "type": "image/png", "sha256": image.sha256, "path": None, "data": b"x"}]


def test_an_export_never_mixes_with_what_is_there(tiny_dataset: Path, tmp_path: Path) -> None:
    export_plain(tiny_dataset, tmp_path / "out", progress=False)
    with pytest.raises(OutputNotEmpty):
        export_plain(tiny_dataset, tmp_path / "out", progress=False)


@pytest.mark.parametrize("layout", [export_plain, export_axolotl])
def test_a_lone_surrogate_in_the_metadata_stays_an_escape(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[..., Any]
) -> None:
    """The writer refuses one, but metadata of a stranger can hold its escape."""
    header, wanted = making.tiny_header(tokenizer_folder), {"a": "x\ud800y", "é": 1}
    rows = [replace(row, metadata=wanted) for row in making.random_rows(2)]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "json", SimpleNamespace(dumps=lambda value, **_: json.dumps(value)))
        making.write_dataset(tmp_path / "dataset", [rows], header=header, tokenizer=tokenizer_folder)
    layout(tmp_path / "dataset", tmp_path / "out", progress=False)
    (file,) = (tmp_path / "out").rglob("*.parquet")
    assert [json.loads(text) for text in pq.read_table(file)["metadata"].to_pylist()] == [wanted] * 2
