"""Exact against stored values: the faithfulness table is right, and a sample must fit its dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import FileDamaged
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME, ExactPosition, sample_from_bytes, sample_to_bytes
from coldstill.storage_schema.header import Codec
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.verified_files import file_record
from coldstill.tools.card.faithfulness import Faithfulness, measure_faithfulness
from tests import making

Fidelity = Literal["fine", "coarse", "exact"]


def captured(
    root: Path, tokenizer: Path, *, fidelity: Fidelity = "fine", positions: int = 200
) -> list[list[CachedRow]]:
    """A sealed dataset of three shards with a faithfulness sample; its rows as the teacher gave them."""
    rng = np.random.default_rng(11)
    shards = [[making.random_row(rng, f"{shard}-{n}", length=40) for n in range(6)] for shard in range(3)]
    header = making.tiny_header(tokenizer, codec=Codec.preset(fidelity, top_k=8))
    store = making.begin_dataset(root, header, tokenizer, [len(rows) for rows in shards])
    for unit, rows in enumerate(shards):
        commit_unit(
            store, unit, rows=rows, rejects=[], header=header, environment={}, faithful_positions=positions // 3
        )
    seal(store)
    return shards


def measured(root: Path) -> Faithfulness:
    faithfulness = measure_faithfulness(open_dataset(root))
    assert faithfulness is not None
    return faithfulness


def slow_kl(exact: dict[int, float], stored: dict[int, float]) -> float:
    """KL over ids and the tail (key -1), by the sum of its definition."""
    total = sum(np.exp(value) for value in exact.values())
    return float(sum(np.exp(p) / total * (p - np.log(total) - stored[key]) for key, p in exact.items()))


def distribution(row: CachedRow, n: int) -> dict[int, float]:
    kept = int(row.targets.counts[n])
    entries = zip(row.targets.ids[n, :kept].tolist(), row.targets.logprobs[n, :kept].astype(float), strict=True)
    return {**dict(entries), -1: float(row.targets.log_tail[n])}


@pytest.mark.parametrize("fidelity", ["fine", "coarse", "exact"])
def test_the_mean_kl_over_many_positions_is_below_the_guarantee(
    tmp_path: Path, tokenizer_folder: Path, fidelity: Fidelity
) -> None:
    captured(tmp_path, tokenizer_folder, fidelity=fidelity)

    found = measured(tmp_path)

    assert found.positions == 198
    assert 0 < found.mean_kl < found.guarantee == Codec.preset(fidelity, top_k=8).mean_kl
    assert found.holds
    assert found.top1_agreement > 0.98
    assert found.top1_error < {"fine": 0.01, "coarse": 0.04, "exact": 0.001}[fidelity]


def test_finer_presets_are_nearer_to_the_teacher(tmp_path: Path, tokenizer_folder: Path) -> None:
    kl = []
    for fidelity in ("exact", "fine", "coarse"):
        captured(tmp_path / fidelity, tokenizer_folder, fidelity=fidelity)
        kl.append(measured(tmp_path / fidelity).mean_kl)

    assert kl == sorted(kl)
    assert kl[0] < 1e-6


def test_the_table_is_that_of_a_slow_comparison(tmp_path: Path, tokenizer_folder: Path) -> None:
    teacher = captured(tmp_path, tokenizer_folder, fidelity="coarse")
    dataset = open_dataset(tmp_path)
    shards = [dataset.read_shard(unit) for unit in range(3)]
    kl, agrees, errors = [], [], []
    for position in sample_from_bytes((tmp_path / FAITHFULNESS_NAME).read_bytes(), where=""):
        exact = distribution(teacher[position.unit][position.row], position.target)
        stored = distribution(shards[position.unit][position.row], position.target)
        kl.append(slow_kl(exact, stored))
        best = min((-value, key) for key, value in exact.items() if key >= 0)
        found = min((-value, key) for key, value in stored.items() if key >= 0)
        agrees.append(best[1] == found[1])
        errors.append(abs(-best[0] - stored[best[1]]))

    table = measured(tmp_path)

    assert table.mean_kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert table.p90_kl == pytest.approx(np.percentile(kl, 90), rel=1e-3)
    assert table.max_kl == pytest.approx(max(kl), rel=1e-3)
    assert table.top1_agreement == np.mean(agrees)
    assert table.top1_error == pytest.approx(np.mean(errors))
    assert table.p50_kl <= table.p90_kl <= table.p99_kl <= table.max_kl


def test_the_order_of_the_sample_does_not_matter_and_no_shard_is_opened_twice(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured(tmp_path, tokenizer_folder)
    before, opened = measured(tmp_path), []
    positions = sample_from_bytes((tmp_path / FAITHFULNESS_NAME).read_bytes(), where="")
    reseal(tmp_path, [positions[n] for n in np.random.default_rng(0).permutation(len(positions))])
    dataset = open_dataset(tmp_path)
    opens = dataset.store.open
    monkeypatch.setattr(dataset.store, "open", lambda name: opened.append(name) or opens(name))

    assert measure_faithfulness(dataset) == before
    assert sorted(opened) == sorted(shard.file.name for shard in dataset.shards)


def test_a_dataset_without_a_sample_has_no_table(tiny_dataset: Path) -> None:
    assert measure_faithfulness(open_dataset(tiny_dataset)) is None


def reseal(root: Path, sample: list[ExactPosition]) -> Dataset:
    """The dataset with another sample, all digests right."""
    data = sample_to_bytes(sample)
    (root / FAITHFULNESS_NAME).write_bytes(data)
    document: dict[str, Any] = json.loads((root / MANIFEST_NAME).read_text())
    record = file_record(FAITHFULNESS_NAME, data).model_dump()
    document["files"] = [record if file["name"] == FAITHFULNESS_NAME else file for file in document["files"]]
    (root / MANIFEST_NAME).write_text(json.dumps(document))
    return open_dataset(root)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unit": 3}, "unit 3"),
        ({"row": 6}, "row 6"),
        ({"target": 1000}, "target 1000"),
        ({"ids": np.arange(50, 58, dtype=np.int32)}, "other ids"),
        ({"log_tail": float("nan")}, "a log-prob of nan"),
        ({"log_tail": float("inf")}, "a log-prob of inf"),
        ({"logprobs": np.full(8, 1e30, np.float32)}, "a log-prob of 1"),
        ({"logprobs": np.zeros(8, np.float32)}, "mass"),
        ({"logprobs": np.full(8, -np.inf, np.float32), "log_tail": float("-inf")}, "mass"),
    ],
)
def test_a_sample_that_is_not_of_its_dataset_is_a_named_error(
    tmp_path: Path, tokenizer_folder: Path, change: dict[str, Any], named: str
) -> None:
    captured(tmp_path, tokenizer_folder)
    sample = sample_from_bytes((tmp_path / FAITHFULNESS_NAME).read_bytes(), where="")
    dataset = reseal(tmp_path, [*sample[:-1], sample[-1]._replace(**change)])

    with pytest.raises(FileDamaged, match=named):
        measure_faithfulness(dataset)


def test_a_dataset_that_breaks_its_guarantee_does_not_hold(tmp_path: Path, tokenizer_folder: Path) -> None:
    captured(tmp_path, tokenizer_folder)
    sample = sample_from_bytes((tmp_path / FAITHFULNESS_NAME).read_bytes(), where="")
    others = [position._replace(logprobs=position.logprobs[::-1].copy()) for position in sample]

    table = measure_faithfulness(reseal(tmp_path, others))

    assert table is not None
    assert not table.holds
