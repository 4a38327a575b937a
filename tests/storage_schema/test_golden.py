"""Golden datasets of all formats read unchanged: ids, counts and levels exactly, log-probs to 1e-6."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from coldstill.common.images import decoded
from coldstill.storage_schema.codec.grid import Grid
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.rows import MediaReference
from coldstill.tools.verify import verify
from tests.storage_schema.plain_decoder import decode_row, media_of

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("format_v*/*") if path.is_dir())
IDS = {
    "format_v1/coarse_wide": "74259e99bc1e",
    "format_v1/exact_draws": "bd083757e385",
    "format_v1/fine_ranks_draws_media": "59d8e98a0119",
    "format_v2/all_fields": "bb82b5c76db0",
    "format_v2/coarse_wide": "1f66615b0320",
    "format_v2/exact_draws": "c2f6d6acf427",
    "format_v2/fine_ranks_draws_media": "763075ca8b0b",
    "format_v2/images": "98dea01e98da",
}


def _expected(name: str) -> list[dict]:
    return json.loads((GOLDEN / f"{name}.expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", [1, 2])
def test_there_is_one_of_each_kind(version: int) -> None:
    headers = [open_dataset(GOLDEN / name).header for name in NAMES if name.startswith(f"format_v{version}/")]
    assert {header.codec.fidelity for header in headers} == {"fine", "coarse", "exact"}
    assert {header.format_version for header in headers} == {version}


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_datasets_are_as_they_were(name: str) -> None:
    assert open_dataset(GOLDEN / name).dataset_id.startswith(IDS[name])
    assert verify(GOLDEN / name, deep=True, progress=False) == []


@pytest.mark.parametrize("name", NAMES)
def test_golden_rows_are_read(name: str) -> None:
    dataset = open_dataset(GOLDEN / name)
    expected = _expected(name)
    assert len(dataset) == len(expected)
    for row, wanted in zip(dataset.rows(), expected, strict=True):
        assert (row.sample_id, row.token_ids.tolist()) == (wanted["sample_id"], wanted["token_ids"])
        targets, offsets = row.targets, row.targets.draw_offsets
        assert targets.positions == len(wanted["positions"])
        for n, position in enumerate(wanted["positions"]):
            count = int(targets.counts[n])
            assert targets.ids[n, :count].tolist() == position["ids"]
            assert targets.draw_ids[offsets[n] : offsets[n + 1]].tolist() == position["draws"]
            np.testing.assert_allclose(targets.logprobs[n, :count], position["logprobs"], rtol=0, atol=1e-6 * 60)
            np.testing.assert_allclose(np.exp(targets.logprobs[n, :count]), np.exp(position["logprobs"]), atol=1e-6)
            np.testing.assert_allclose(targets.log_tail[n], position["log_tail"], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(targets.label_logprob[n], position["label_logprob"], rtol=1e-6, atol=1e-6)
            if targets.draw_logprobs is not None:
                stored = targets.draw_logprobs[offsets[n] : offsets[n + 1]]
                np.testing.assert_allclose(stored, position["draw_logprobs"], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_decoder_reads_them_too(name: str) -> None:
    """Written from FORMAT.md alone, it gives the levels that were written, to the last one."""
    dataset = open_dataset(GOLDEN / name)
    header = json.loads(dataset.header.to_bytes())
    rows = [row for shard in dataset.shards for row in pq.read_table(GOLDEN / name / shard.file.name).to_pylist()]
    for row, wanted in zip(rows, _expected(name), strict=True):
        decoded = decode_row(row, header)
        assert [position["levels"] for position in decoded] == [position["levels"] for position in wanted["positions"]]
        assert [position["ids"] for position in decoded] == [position["ids"] for position in wanted["positions"]]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("exact_draws")])
def test_levels_of_the_grid_are_those_of_the_golden_rows(name: str) -> None:
    """Putting a level's own log-prob on the grid gives the level: reader and writer mean the same grid."""
    codec = open_dataset(GOLDEN / name).header.codec
    assert codec.a is not None
    assert codec.b is not None
    grid = Grid(codec.a, codec.b)
    levels = [level for row in _expected(name) for position in row["positions"] for level in position["levels"]]
    np.testing.assert_array_equal(grid.levels(grid.logprobs[levels]), levels)


@pytest.mark.parametrize("version", [1, 2])
def test_golden_media_are_read(version: int) -> None:
    first = next(iter(open_dataset(GOLDEN / f"format_v{version}" / "fine_ranks_draws_media").rows()))
    inline, path = first.media
    assert inline.data == b"\x89PNG, nearly"
    assert path == MediaReference(position=3, type="image/png", sha256=inline.sha256, path="media/cat.png")
    assert first.metadata == {"topic": "Ü", "n": [1, 2.5, None]}


def test_golden_images_are_read_and_the_plain_decoder_reads_them_too() -> None:
    dataset = open_dataset(GOLDEN / "format_v2/images")
    header = json.loads(dataset.header.to_bytes())
    stored = [
        row for shard in dataset.shards for row in pq.read_table(Path(dataset.store.root, shard.file.name)).to_pylist()
    ]
    for row, columns in zip(dataset.rows(), stored, strict=True):
        found = [(item.position, item.type, dataset.media_content(item)) for item in row.media]
        assert found == media_of(columns, header, Path(dataset.store.root))
    sizes = [[decoded(dataset.media_content(item), where="").size for item in row.media] for row in dataset.rows()]
    assert sizes == [[(3, 2), (12, 8)], [], [(12, 8), (12, 8), (3, 2)]]
    assert dataset.header.about.processor is not None
    assert dataset.header.about.processor.image_token_id == 7
