"""Batches of rows: padding, alignment, and what the targets hold."""

from __future__ import annotations

import numpy as np
import torch

from coldstill.trainer.data.collate import IGNORED, collate, collate_packs
from tests import making

from .datasets import make_rows


def test_a_batch_is_padded_on_the_right_and_its_labels_are_aligned():
    rng = np.random.default_rng(0)
    rows = [making.random_row(rng, f"r{n}", length=length) for n, length in enumerate((5, 17, 9))]
    batch = collate(rows)
    assert batch["sample_ids"] == ["r0", "r1", "r2"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (3, 17)
    assert torch.equal(batch["target_samples"], batch["targets"].row)
    for b, row in enumerate(rows):
        length = row.token_ids.size
        assert batch["attention_mask"][b].tolist() == [1] * length + [0] * (17 - length)
        assert batch["position_ids"][b].tolist() == [*range(length), *range(17 - length)]
        assert batch["input_ids"][b, :length].tolist() == row.token_ids.tolist()
        labels = {int(t): int(row.token_ids[t + 1]) for t in row.positions}
        assert batch["labels"][b].tolist() == [labels.get(t, IGNORED) for t in range(17)]


def test_rows_of_a_pack_are_consecutive_and_their_positions_start_at_zero():
    rng = np.random.default_rng(1)
    rows = [making.random_row(rng, f"r{n}", length=length) for n, length in enumerate((5, 7, 9))]
    batch = collate_packs([rows[:2], rows[2:]], length=14)
    assert "attention_mask" not in batch
    assert batch["sample_ids"] == ["r0", "r1", "r2"]
    assert batch["position_ids"].tolist() == [[*range(5), *range(7), 0, 1], [*range(9), *range(5)]]
    tokens = [row.token_ids.tolist() for row in rows]
    assert batch["input_ids"].tolist() == [[*tokens[0], *tokens[1], 0, 0], [*tokens[2], *[0] * 5]]
    places = [(0, int(t), 0) for t in rows[0].positions]
    places += [(0, 5 + int(t), 1) for t in rows[1].positions] + [(1, int(t), 2) for t in rows[2].positions]
    targets = batch["targets"]
    found = zip(targets.row.tolist(), targets.position.tolist(), batch["target_samples"].tolist(), strict=True)
    assert list(found) == places
    labels = torch.full((2, 14), IGNORED)
    for b, t, _ in places:
        labels[b, t] = batch["input_ids"][b, t + 1]
    assert torch.equal(batch["labels"], labels)


def check_targets(targets, rows):
    """Position by position against the rows."""
    at = 0
    for b, row in enumerate(rows):
        for n, position in enumerate(row.positions):
            known = row.targets.slice(n, n + 1)
            count = known.draw_ids.size
            assert (int(targets.row[at]), int(targets.position[at])) == (b, position)
            assert targets.labels[at] == row.token_ids[position + 1]
            assert targets.ids[at].tolist() == known.ids[0].tolist()
            assert targets.logprobs[at].tolist() == known.logprobs[0].tolist()
            assert targets.log_tail[at] == known.log_tail[0]
            assert targets.label_logprob[at] == known.label_logprob[0]
            assert targets.draws[at, :count].tolist() == known.draw_ids.tolist()
            assert targets.draw_weights[at].tolist() == [
                *[np.float32(1 / max(count, 1))] * count,
                *[0] * (targets.draws.shape[1] - count),
            ]
            if targets.draw_logprobs is not None:
                assert targets.draw_logprobs[at, :count].tolist() == known.draw_logprobs.tolist()
            at += 1
    assert at == targets.count


def test_sparse_targets_are_the_rows_targets_in_order():
    rows = make_rows(4)
    targets = collate(rows)["targets"]
    assert targets.draw_logprobs is None
    check_targets(targets, rows)


def test_log_probs_of_draws_are_kept_if_all_rows_have_them():
    rows = make_rows(4, draw_logprobs=True)
    targets = collate(rows)["targets"]
    assert targets.draw_logprobs is not None
    check_targets(targets, rows)
    assert collate([*rows, *make_rows(1)])["targets"].draw_logprobs is None


def test_rows_without_draws_give_no_columns_of_draws():
    targets = collate([making.random_row(np.random.default_rng(2), "r", draws=0)])["targets"]
    assert targets.draws.shape == targets.draw_weights.shape == (targets.count, 0)


def test_targets_move_and_split_as_a_whole():
    targets = collate(make_rows(3, draw_logprobs=True))["targets"]
    assert {value.device for value in vars(targets.to("meta")).values()} == {torch.device("meta")}
    part = targets.part(2, 5)
    assert part.count == 3
    assert torch.equal(part.ids, targets.ids[2:5])
    assert collate(make_rows(3))["targets"].part(1, 2).draw_logprobs is None
