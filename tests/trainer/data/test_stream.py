"""Laws of the order of batches: epochs, workers, ranks, and exact resuming from a cursor."""

from __future__ import annotations

import hashlib
import json
import pickle
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.errors import CursorMismatch

from .datasets import all_same, names, same

PACKINGS = [None, 48]


def stream(dataset, **changes):
    """Batches of 4 of the dataset, or of those of several."""
    weights = changes.pop("weights", None)
    return load_logit_dataset(dataset, weights=weights).stream(**{"batch_size": 4, "seed": 3, **changes})


def first(stream, count):
    """The first `count` batches."""
    return list(islice(stream, count))


@pytest.mark.parametrize("pack_length", PACKINGS)
def test_every_row_comes_once_per_epoch_in_another_order_each(grouped, pack_length):
    wanted = sorted(row.sample_id for row in open_dataset(grouped).rows())
    batches = list(stream(grouped, pack_length=pack_length, epochs=3))
    epochs = [names([b for b in batches if b["cursor"]["walk"]["epoch"] == e + 1]) for e in range(3)]
    ends = [n for n, batch in enumerate(batches) if not batch["cursor"]["walk"]["pending"]]
    whole = [names(batches[: n + 1]) for n in ends]
    for epoch in (1, 2, 3):
        assert any(sorted(found) == sorted(wanted * epoch) for found in whole)
    assert sorted(names(batches)) == sorted(wanted * 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_a_function_of_the_seed(grouped):
    assert all_same(list(stream(grouped, epochs=1)), list(stream(grouped, epochs=1)))
    assert names(stream(grouped, epochs=1)) != names(stream(grouped, epochs=1, seed=4))


def test_without_shuffling_rows_come_in_stored_order(grouped):
    wanted = [row.sample_id for row in open_dataset(grouped).rows()]
    assert names(stream(grouped, epochs=2, shuffle=False)) == wanted * 2


def test_rows_of_different_row_groups_share_a_window(grouped):
    stored = {row.sample_id: n for n, row in enumerate(open_dataset(grouped).rows())}
    places = [stored[name] for name in names(first(stream(grouped), 4))]
    assert len({place // 5 for place in places}) == 4


@pytest.mark.parametrize("pack_length", PACKINGS)
@pytest.mark.parametrize("batch_size", [1, 4, 77, 100])
def test_an_epoch_has_batches_per_epoch_batches(grouped, pack_length, batch_size):
    one = stream(grouped, pack_length=pack_length, epochs=1, batch_size=batch_size)
    found = len(list(one))
    if pack_length is None:
        assert one.batches_per_epoch == found
    else:
        assert one.batches_per_epoch == pytest.approx(found, rel=0.05, abs=1)


@pytest.mark.parametrize("pack_length", PACKINGS)
def test_the_order_does_not_depend_on_workers(grouped, pack_length):
    one = stream(grouped, pack_length=pack_length, epochs=2)
    alone = list(one)
    for workers in (1, 2):
        assert all_same(list(DataLoader(one, batch_size=None, num_workers=workers)), alone)


@pytest.mark.parametrize("pack_length", PACKINGS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_take_the_batches_of_one_rank_in_turn(grouped, pack_length, ranks):
    alone = list(stream(grouped, pack_length=pack_length, epochs=2))
    shares = [
        list(stream(grouped, pack_length=pack_length, epochs=2, rank=rank, world_size=ranks)) for rank in range(ranks)
    ]
    turns = zip(*shares, strict=False)
    assert all(len({json.dumps(batch["cursor"]) for batch in turn}) == 1 for turn in turns)
    assert sum(len(share) for share in shares) == len(alone)
    for number, batch in enumerate(alone):
        shared = shares[number % ranks][number // ranks]
        assert all(same(shared[name], batch[name]) for name in batch.keys() - {"cursor"})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack_length", PACKINGS)
def test_a_run_killed_twice_in_an_epoch_continues_like_an_uninterrupted_one(grouped, pack_length, workers):
    whole = first(stream(grouped, pack_length=pack_length), 34)
    for kills in ((3, 2), (21, 7), (1, 0)):
        done, cursor = [], None
        for count in (*kills, 6):
            run = stream(grouped, pack_length=pack_length)
            run.seek(cursor)
            # Batches that loader workers decoded in advance are lost; no row is.
            part = first(
                DataLoader(run, batch_size=None, num_workers=workers, prefetch_factor=workers * 2 or None), count
            )
            done += part
            cursor = json.loads(json.dumps(done[-1]["cursor"]))
        assert all_same(done, whole[: len(done)])


@pytest.mark.parametrize("pack_length", PACKINGS)
def test_it_resumes_after_every_single_batch(grouped, pack_length):
    run = stream(grouped, pack_length=pack_length, epochs=2)
    whole = list(run)
    for number, batch in enumerate(whole):
        run.seek(batch["cursor"])
        assert all_same(first(run, 2), whole[number + 1 : number + 3])


def test_a_run_may_resume_with_other_workers_ranks_and_batch_size(grouped):
    whole = first(stream(grouped), 12)
    run = stream(grouped, world_size=2, rank=1)
    run.seek(whole[3]["cursor"])
    loader = DataLoader(run, batch_size=None, num_workers=2)
    assert [batch["sample_ids"] for batch in islice(loader, 4)] == [b["sample_ids"] for b in whole[5:12:2]]
    larger = stream(grouped, batch_size=8)
    larger.seek(whole[3]["cursor"])
    assert names(first(larger, 2)) == names(whole[4:8])


def test_every_pass_begins_at_the_place_of_seek(grouped):
    run = stream(grouped)
    whole = first(run, 6)
    run.seek(whole[1]["cursor"])
    assert all_same(first(run, 2), whole[2:4])
    assert all_same(first(run, 2), whole[2:4])
    run.seek(None)
    assert all_same(first(run, 2), whole[:2])


def test_a_cursor_is_small(grouped):
    for batch in first(stream(grouped, pack_length=48), 20):
        assert len(json.dumps(batch["cursor"])) < 3000


@pytest.mark.parametrize(
    ("change", "field"),
    [({"seed": 4}, "seed"), ({"shuffle": False}, "shuffle"), ({"pack_length": 64}, "pack_length")],
)
def test_a_cursor_of_another_order_is_a_named_error(grouped, change, field):
    cursor = next(iter(stream(grouped)))["cursor"]
    with pytest.raises(CursorMismatch, match=field):
        stream(grouped, **change).seek(cursor)


def test_a_cursor_of_another_dataset_weight_or_version_is_a_named_error(grouped, other):
    cursor = next(iter(stream(grouped)))["cursor"]
    with pytest.raises(CursorMismatch, match="datasets"):
        stream(other).seek(cursor)
    with pytest.raises(CursorMismatch, match="version"):
        stream(grouped).seek({**cursor, "version": 0})
    mixed = next(iter(stream([grouped, other], weights=[1, 2])))["cursor"]
    with pytest.raises(CursorMismatch, match="weights"):
        stream([grouped, other], weights=[1, 3]).seek(mixed)


def test_a_stream_can_be_pickled_for_spawned_workers(grouped):
    dataset = load_logit_dataset(grouped)
    assert 0 < dataset.mean_tail_mass() < 1
    run = dataset.stream(batch_size=4, seed=3)
    assert all_same(first(pickle.loads(pickle.dumps(run)), 2), first(run, 2))


UNPACKED_CURSOR = {
    "version": 1,
    "weights": [77.0],
    "seed": 3,
    "shuffle": True,
    "pack_length": None,
    "walk": {"epoch": 0, "batches": 5, "mixture": {"taken": 20, "feeds": [[0, 0, 0, 20]]}, "pending": []},
}
PACKED_CURSOR = {
    **UNPACKED_CURSOR,
    "pack_length": 48,
    "walk": {
        "epoch": 0,
        "batches": 5,
        "mixture": {"taken": 77, "feeds": [[0, 1, 5, 17]]},
        "pending": [
            *([0, 0, 1, 2, 9], [0, 0, 3, 1, 8], [0, 0, 5, 0, 9], [0, 0, 4, 0, 5], [0, 0, 3, 0, 5], [0, 0, 2, 3, 5]),
            *([0, 0, 5, 4, 4], [0, 3, 2, 1, 5], [0, 3, 0, 0, 9], [0, 3, 1, 4, 5], [0, 3, 0, 4, 8]),
        ],
    },
}
MIXED_CURSOR = {
    **UNPACKED_CURSOR,
    "weights": [1.0, 2.0],
    "walk": {
        "epoch": 0,
        "batches": 5,
        "mixture": {"taken": 20, "feeds": [[0, 0, 0, 9], [0, 0, 0, 11]]},
        "pending": [],
    },
}
NEXT_UNPACKED = "45 6 60 38 9 61 35 37 39 47 64 5"
NEXT_PACKED = (
    "7 25 65 16 69 20 15 13 76 74 29 5 62 14 42 10 20 22 2 8 32 12 1 44 16 21 31 51 9 50 3 23 0 6"  # of two epochs
)
NEXT_MIXED = "other-0 other-15 other-13 other-9 other-11 57 56 other-16 other-27 51 32 other-25"


@pytest.mark.parametrize(
    ("cursor", "following"),
    [(UNPACKED_CURSOR, NEXT_UNPACKED), (PACKED_CURSOR, NEXT_PACKED), (MIXED_CURSOR, NEXT_MIXED)],
    ids=["rows", "packs", "mixture"],
)
def test_a_cursor_of_an_earlier_release_leads_to_the_same_rows(grouped, other, cursor, following):
    """The cursors and rows are literals: the keys of a cursor are stored in checkpoints and must not change."""
    paths, weights = ([grouped, other], [1, 2]) if cursor is MIXED_CURSOR else (grouped, None)
    run = stream(paths, weights=weights, pack_length=cursor["pack_length"])
    own = next(iter(run))["cursor"]
    assert own.keys() - {"datasets"} == cursor.keys()
    assert own["walk"].keys() == cursor["walk"].keys()
    run.seek({**cursor, "datasets": own["datasets"]})
    wanted = [name if name.startswith("other") else f"row-{name}" for name in following.split()]
    assert names(first(run, 3)) == wanted


ORDERS = {
    "rows": ({}, 60, "34e256241383aa11"),
    "packs": ({"pack_length": 48}, 18, "af1e3ecfb9327614"),
    "stored": ({"shuffle": False}, 60, "4dfb685174b056cd"),
    "mixture": ({"weights": [1, 2]}, 90, "40022ae7edc0fc50"),
    "mixed packs": ({"weights": [1, 2], "pack_length": 40}, 33, "03219607a752c060"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_and_the_cursors_of_three_epochs_are_those_of_earlier_commits(grouped, other, name):
    """The digests are literals, written by an earlier commit: runs that began then resume with the same rows."""
    changes, count, digest = ORDERS[name]
    paths = [grouped, other] if "weights" in changes else grouped
    found = [[batch["sample_ids"], batch["cursor"]["walk"]] for batch in stream(paths, epochs=3, **changes)]
    assert len(found) == count
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == digest
