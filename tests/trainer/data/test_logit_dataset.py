"""Facts of a dataset before a batch is read, and the errors of unusable datasets."""

from __future__ import annotations

import numpy as np
import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import DatasetNotFound, DatasetNotSealed, StreamDamaged
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.shard import SCHEMA
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.errors import NoTargets
from tests import making

from .datasets import make_rows, write_grouped


def test_facts_are_those_of_all_datasets(grouped, other):
    one, two = open_dataset(grouped), open_dataset(other)
    both = load_logit_dataset([grouped, other])
    assert both.header == one.header
    assert both.dataset_ids == (one.dataset_id, two.dataset_id)
    assert both.rows == len(one) + len(two)
    assert both.targets == one.manifest.targets + two.manifest.targets


def test_the_mean_tail_mass_is_that_of_all_positions_within_its_sample(grouped):
    exact = np.concatenate([np.exp(row.targets.log_tail) for row in open_dataset(grouped).rows()])
    assert load_logit_dataset(grouped).mean_tail_mass() == pytest.approx(exact.mean(), abs=float(exact.std()) / 4)


def test_an_unsealed_dataset_is_a_named_error(tiny_dataset):
    (tiny_dataset / MANIFEST_NAME).unlink()
    with pytest.raises(DatasetNotSealed):
        load_logit_dataset(tiny_dataset)


def test_a_missing_dataset_is_a_named_error(tmp_path):
    with pytest.raises(DatasetNotFound):
        load_logit_dataset(tmp_path)


def test_a_dataset_without_targets_is_a_named_error(tokenizer_folder, tmp_path):
    header = making.tiny_header(tokenizer_folder)
    path = write_grouped(tmp_path / "d", [[]], header=header, tokenizer=tokenizer_folder, rows_of_group=1)
    with pytest.raises(NoTargets):
        load_logit_dataset(path)


def test_a_row_with_damaged_frames_is_named_and_other_rows_are_read(tokenizer_folder, tmp_path, monkeypatch):
    """The digest is right, so the writer was wrong. Rows of other ranks are not decoded."""
    from tests.trainer.data import datasets

    def damage(batches, *, header):
        broken = []
        for number, batch in enumerate(batches):
            columns = {name: batch.column(name).to_pylist() for name in SCHEMA.names}
            if number == 1:
                columns["ids"][2] = columns["ids"][2][:-1] + bytes([columns["ids"][2][-1] ^ 1])
            broken.append(datasets.pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
        return original(broken, header=header)

    original = datasets.copy_shard
    monkeypatch.setattr(datasets, "copy_shard", damage)
    header = making.tiny_header(tokenizer_folder)
    path = write_grouped(tmp_path / "d", [make_rows(20)], header=header, tokenizer=tokenizer_folder, rows_of_group=5)
    dataset = load_logit_dataset(path)
    settings = {"batch_size": 1, "seed": 0, "epochs": 1, "shuffle": False, "world_size": 2}
    assert len(list(dataset.stream(**settings, rank=0))) == 10
    with pytest.raises(StreamDamaged, match=r"shards/.*, row 2 of row group 1"):
        list(dataset.stream(**settings, rank=1))


def test_the_draws_of_a_position_are_those_used_and_the_ids_cut_by_a_smaller_k(tiny_dataset):
    header = open_dataset(tiny_dataset).header
    stored = min(header.draws, header.kept_draws)
    assert load_logit_dataset(tiny_dataset).draws == stored > 0
    assert load_logit_dataset(tiny_dataset, draws=0).draws == 0
    assert load_logit_dataset(tiny_dataset, draws=0, top_k=header.top_k).draws == 0
    assert load_logit_dataset(tiny_dataset, draws=0, top_k=header.top_k - 1).draws > 0


def test_only_a_cache_of_the_whole_vocabulary_is_dense(tokenizer_folder, tmp_path):
    for top_k, min_prob, dense in ((64, 0.0, True), (64, 1e-4, False), (8, 0.0, False)):
        header = making.tiny_header(tokenizer_folder, top_k=top_k, min_prob=min_prob)
        rows = [making.random_row(np.random.default_rng(0), "row", top_k=top_k)]
        path = tmp_path / f"{top_k} {min_prob}"
        making.write_dataset(path, [rows], header=header, tokenizer=tokenizer_folder)
        assert load_logit_dataset(path).is_dense == dense
        assert not load_logit_dataset(path, top_k=4).is_dense
