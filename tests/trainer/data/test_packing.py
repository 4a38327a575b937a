"""Packs are full, rows stay whole and wait for a bounded time, and packing changes no target or logit."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.data.packing import WINDOW_ROWS, Packer, packs_of
from coldstill.trainer.data.row_reader import RowReference
from coldstill.trainer.errors import RowTooLong


def references(lengths):
    return [RowReference(0, 0, 0, n, int(length)) for n, length in enumerate(lengths)]


def packed(lengths, pack_length):
    """All packs of rows of these lengths, in the simplest use of a packer."""
    packer, packs, waiting = Packer(pack_length), [], references(lengths)
    while waiting or not packer.is_empty:
        while waiting and not packer.is_full:
            packer.add(waiting.pop(0))
        packs.append(packer.pack())
    return packs


def lognormal(count, mean, most, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(0, 0.7, count) * mean / 1.28, 2, most).astype(int)


@pytest.mark.parametrize("mean", [20, 100, 400])
def test_every_row_is_in_one_pack_whole_and_no_pack_overflows(mean):
    lengths = lognormal(1000, mean, 1024)
    packs = packed(lengths, 1024)
    assert sorted(row.row for pack in packs for row in pack) == list(range(1000))
    assert all(sum(row.length for row in pack) <= 1024 for pack in packs)
    assert packs_of(lengths.tolist(), 1024) == len(packs)


def test_packs_are_full():
    lengths = lognormal(4000, 250, 1024)
    assert lengths.sum() / (1024 * len(packed(lengths, 1024))) > 0.98


def test_a_pack_takes_the_longest_row_that_fits_each_time():
    assert [[row.length for row in pack] for pack in packed([6, 2, 5, 4, 3, 1, 9], 10)] == [[6, 4], [2, 5, 3], [1, 9]]


def test_of_rows_of_equal_length_the_oldest_is_packed_first():
    assert [[row.row for row in pack] for pack in packed([5, 5, 5, 5, 5], 10)] == [[0, 1], [2, 3], [4]]


def test_no_row_waits_for_more_packs_than_the_window_has_rows():
    """A row of 7 tokens fits behind none of the longer rows, which never end."""
    packer, came, waited = Packer(10), {}, []
    waiting = references([7, 10, 10, 10] * 300)
    for number in range(800):
        while not packer.is_full:
            came[waiting[0].row] = number
            packer.add(waiting.pop(0))
        waited += [number - came[row.row] for row in packer.pack()]
    assert 0 < max(waited) <= WINDOW_ROWS


def test_a_restored_packer_continues_like_the_original():
    one, two = Packer(512), Packer(512)
    for row in references(lognormal(WINDOW_ROWS, 100, 512)):
        one.add(row)
    for _ in range(5):
        one.pack()
    two.restore(one.pending())
    while not one.is_empty:
        assert one.pack() == two.pack()
    assert two.is_empty


def by_sample(batches):
    """Per row: its tokens, and per target its position in the row and all its stored values."""
    found = {}
    for batch in batches:
        targets = batch["targets"]
        # The row of a place in a pack begins at the last position 0 before it.
        starts = (batch["position_ids"] == 0).long() * torch.arange(batch["input_ids"].shape[1])
        starts = starts.cummax(1).values
        for m in range(targets.count):
            b, t = int(targets.row[m]), int(targets.position[m])
            start = int(starts[b, t])
            name = batch["sample_ids"][int(batch["target_samples"][m])]
            tokens = batch["input_ids"][b, start : t + 2].tolist()
            draws = sorted(zip(targets.draws[m].tolist(), targets.draw_weights[m].tolist(), strict=True))
            known = (targets.ids[m].tolist(), targets.logprobs[m].tolist(), float(targets.log_tail[m]))
            label = (int(targets.labels[m]), int(batch["labels"][b, t]), float(targets.label_logprob[m]))
            assert int(batch["position_ids"][b, t]) == t - start
            entry = (t - start, tokens, known, label, [draw for draw in draws if draw[1]])
            found.setdefault(name, []).append(entry)
    return found


def test_packed_and_unpacked_hold_the_same_targets_at_the_right_places(grouped):
    dataset = load_logit_dataset(grouped)
    loose = by_sample(dataset.stream(batch_size=4, seed=0, epochs=1))
    tight = by_sample(dataset.stream(batch_size=3, seed=5, epochs=1, pack_length=50))
    assert len(loose) == 77
    assert tight == loose


def test_packed_rows_do_not_attend_to_each_other(grouped, tiny_student):
    """The student has the same logits for a row in a pack and for the row alone."""
    model = LlamaForCausalLM.from_pretrained(tiny_student).eval()
    dataset = load_logit_dataset(grouped)
    said: list[dict] = []
    for pack_length in (None, 64):
        answers = {}
        for batch in dataset.stream(batch_size=8, seed=0, epochs=1, pack_length=pack_length):
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits[batch["targets"].row, batch["targets"].position]
            for sample, of_target in zip(batch["target_samples"].tolist(), logits, strict=True):
                answers.setdefault(batch["sample_ids"][sample], []).append(of_target)
        said.append({name: torch.stack(rows) for name, rows in answers.items()})
    loose, tight = said
    assert loose.keys() == tight.keys()
    assert max(float((loose[name] - tight[name]).abs().max()) for name in loose) < 1e-5


def test_a_row_longer_than_a_pack_is_named(grouped):
    run = load_logit_dataset(grouped).stream(batch_size=4, seed=0, pack_length=16)
    with pytest.raises(RowTooLong, match=r"row 'row-\d+' of .*dataset"):
        list(islice(run, 50))
