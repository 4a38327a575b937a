"""Mixtures of datasets by weight resume as exactly as one dataset."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from torch.utils.data import DataLoader

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.errors import InvalidMixture
from tests import making

from .datasets import all_same, make_rows, names, write_grouped


def mixed(grouped, other, *, weights=None, **changes):
    return load_logit_dataset([grouped, other], weights=weights).stream(**{"batch_size": 5, "seed": 1, **changes})


def share_of_other(sample_ids):
    return sum(name.startswith("other") for name in sample_ids) / len(sample_ids)


@pytest.mark.parametrize(("weights", "share"), [([1, 3], 0.75), ([0.9, 0.1], 0.1), (None, 40 / 117)])
def test_rows_come_from_each_dataset_by_its_weight(grouped, other, weights, share):
    found = share_of_other(names(list(islice(mixed(grouped, other, weights=weights, batch_size=100), 15))))
    assert found == pytest.approx(share, abs=4 * (share * (1 - share) / 1500) ** 0.5)


def test_every_row_of_a_dataset_comes_once_before_any_comes_again(grouped, other):
    found = names(list(islice(mixed(grouped, other, weights=[1, 1]), 60)))
    for path, beginning in ((grouped, "row"), (other, "other")):
        wanted = sorted(row.sample_id for row in open_dataset(path).rows())
        mine = [name for name in found if name.startswith(beginning)]
        assert sorted(mine[: len(wanted)]) == wanted


@pytest.mark.parametrize("weights", [None, [5, 1]])
@pytest.mark.parametrize("pack_length", [None, 48])
def test_measuring_a_mixture_takes_each_row_once_in_stored_order(grouped, other, weights, pack_length):
    stored = [row.sample_id for path in (grouped, other) for row in open_dataset(path).rows()]
    ranks = [
        names(list(mixed(grouped, other, weights=weights, pack_length=pack_length, epochs=2, shuffle=False, **share)))
        for share in ({}, {"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 2})
    ]
    assert sorted(ranks[0]) == sorted(ranks[1] + ranks[2]) == sorted(stored * 2)
    assert pack_length or ranks[0] == stored * 2


def test_an_epoch_of_a_mixture_has_as_many_rows_as_its_datasets(grouped, other):
    assert len(names(list(mixed(grouped, other, weights=[1, 5], epochs=2)))) == 2 * (77 + 40)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack_length", [None, 48])
def test_a_killed_mixture_resumes_exactly(grouped, other, pack_length, workers):
    whole = list(islice(mixed(grouped, other, weights=[2, 1], pack_length=pack_length), 40))
    for number in (7, 31) if workers else range(0, 35, 3):
        run = mixed(grouped, other, weights=[2, 1], pack_length=pack_length)
        run.seek(json.loads(json.dumps(whole[number]["cursor"])))
        loader = DataLoader(run, batch_size=None, num_workers=workers)
        assert all_same(list(islice(loader, 5)), whole[number + 1 : number + 6])


def test_datasets_of_two_widths_share_a_batch(grouped, tokenizer_folder, tmp_path):
    rows = [making.random_row(np.random.default_rng(n), f"narrow-{n}", top_k=3) for n in range(20)]
    header = making.tiny_header(tokenizer_folder, top_k=3)
    narrow = write_grouped(tmp_path / "narrow", [rows], header=header, tokenizer=tokenizer_folder, rows_of_group=9)
    batch = next(iter(mixed(grouped, narrow, weights=[1, 1], batch_size=30)))
    targets = batch["targets"]
    of_narrow = [name.startswith("narrow") for name in batch["sample_ids"]]
    for m, sample in enumerate(batch["target_samples"].tolist()):
        assert int(targets.kept[m].sum()) == (3 if of_narrow[sample] else 8)
    assert (targets.ids[~targets.kept] == targets.ids[:, :1].expand_as(targets.ids)[~targets.kept]).all()


def test_datasets_of_two_tokenizers_are_a_named_error(grouped, tmp_path):
    stranger = making.tiny_tokenizer(tmp_path / "tokenizer", vocabulary=65)
    header = making.tiny_header(stranger)
    path = write_grouped(tmp_path / "x", [make_rows(3)], header=header, tokenizer=stranger, rows_of_group=3)
    with pytest.raises(TokenizerMismatch):
        load_logit_dataset([grouped, path])


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_invalid_weights_are_a_named_error(grouped, other, weights):
    with pytest.raises(InvalidMixture):
        load_logit_dataset([grouped, other], weights=weights)


def test_an_empty_list_of_datasets_is_a_named_error():
    with pytest.raises(InvalidMixture):
        load_logit_dataset([])
