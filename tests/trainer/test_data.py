"""Order, batches and alignment of the rows that the student sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from storage_schema import open_dataset
from tests import making
from trainer.data import IGNORED, StreamingRows, collate
from trainer.targets import SparseTargets


def order(rows: StreamingRows, epoch: int) -> list[str]:
    rows.set_epoch(epoch)
    return [row.sample_id for row in rows]


def test_every_row_comes_once_per_epoch_in_an_order_of_seed_and_epoch_alone(tiny_dataset):
    first, second = (StreamingRows(open_dataset(tiny_dataset), seed=3) for _ in range(2))
    epochs = [order(first, epoch) for epoch in range(3)]
    assert [order(second, epoch) for epoch in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == len(first) == 24
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(StreamingRows(open_dataset(tiny_dataset), seed=4), 0) != epochs[0]


def test_rows_of_a_shard_stay_together_so_that_one_shard_is_in_memory(tiny_dataset):
    shards = [name.split("-")[1] for name in order(StreamingRows(open_dataset(tiny_dataset), seed=0), 0)]
    assert sum(a != b for a, b in zip(shards[1:], shards[:-1], strict=True)) == 2


def test_loader_workers_are_refused_as_each_would_give_every_row(tiny_dataset):
    rows = StreamingRows(open_dataset(tiny_dataset), seed=0)
    with pytest.raises(RuntimeError, match="dataloader_num_workers=0"):
        list(DataLoader(rows, collate_fn=collate, num_workers=1))


def test_a_batch_is_padded_on_the_right_and_its_labels_are_aligned():
    rng = np.random.default_rng(0)
    rows = [making.random_row(rng, f"r{n}", length=length) for n, length in enumerate((5, 17, 9))]
    batch = collate(rows)
    assert batch["sample_ids"] == ["r0", "r1", "r2"]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 17)
    for b, row in enumerate(rows):
        length = row.token_ids.size
        assert batch["attention_mask"][b].tolist() == [1] * length + [0] * (17 - length)
        assert batch["input_ids"][b, :length].tolist() == row.token_ids.tolist()
        labels = {int(t): int(row.token_ids[t + 1]) for t in row.positions}
        assert batch["labels"][b].tolist() == [labels.get(t, IGNORED) for t in range(17)]


def test_sparse_targets_are_the_rows_targets_in_order():
    rng = np.random.default_rng(1)
    rows = [making.random_row(rng, f"r{n}") for n in range(4)]
    targets = SparseTargets.from_rows(rows)
    at = 0
    for b, row in enumerate(rows):
        for n, position in enumerate(row.positions):
            known = row.targets.slice(n, n + 1)
            assert (int(targets.row[at]), int(targets.position[at])) == (b, position)
            assert targets.labels[at] == row.token_ids[position + 1]
            assert targets.ids[at].tolist() == known.ids[0].tolist()
            assert targets.logprobs[at].tolist() == known.logprobs[0].tolist()
            assert targets.log_tail[at] == known.log_tail[0]
            assert targets.label_logprob[at] == known.label_logprob[0]
            assert targets.draws[at, : targets.draw_counts[at]].tolist() == known.draw_ids.tolist()
            at += 1
    assert at == targets.count


def test_rows_without_draws_give_no_columns_of_draws():
    targets = SparseTargets.from_rows([making.random_row(np.random.default_rng(2), "r", draws=0)])
    assert targets.draws.shape == (targets.count, 0)
    assert targets.draw_counts.tolist() == [0] * targets.count


def test_targets_move_as_a_whole():
    targets = SparseTargets.from_rows([making.random_row(np.random.default_rng(2), "r")]).to("meta")
    assert {value.device for value in vars(targets).values()} == {torch.device("meta")}
