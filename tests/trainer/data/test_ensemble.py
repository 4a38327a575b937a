"""An ensemble reads the same rows of every dataset, in the order of the first one, or names the row that differs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.derive.subset import subset
from coldstill.trainer.data.collate import collate, collate_packs
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.errors import CursorMismatch, EnsembleMismatch, InvalidMixture
from tests import making

from .datasets import all_same, make_rows, same, write_grouped

ROWS = 77


def by_another_teacher(rows: Sequence[CachedRow], *, top_k: int = 5, draws: int = 6) -> list[CachedRow]:
    """The same rows with the targets of another random teacher."""
    rng, found = np.random.default_rng(9), []
    for row in rows:
        probs = making.random_probs(rng, row.positions.size, making.VOCABULARY)
        targets = making.targets_of(probs, row.labels, top_k=top_k, draws=draws, seed=int(rng.integers(1 << 30)))
        found.append(replace(row, targets=targets))
    return found


@pytest.fixture(scope="session")
def write_second(tokenizer_folder: Path) -> Callable[..., str]:
    """Writes the rows of `grouped` by another teacher, after a change, in shards and row groups of other sizes."""

    def write(root: Path, change: Callable[[list[CachedRow]], list[CachedRow]] = list, *, at: int = 41) -> str:
        rows = change(by_another_teacher(make_rows(ROWS)))
        header = making.tiny_header(tokenizer_folder, top_k=5, draws=6)
        return write_grouped(root, [rows[:at], rows[at:]], header=header, tokenizer=tokenizer_folder, rows_of_group=8)

    return write


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, write_second: Callable[..., str]) -> str:
    """The rows of `grouped` by another teacher, K = 5, 6 draws; read-only."""
    return write_second(tmp_path_factory.mktemp("second") / "dataset")


def stream_of(*paths: str, **changes: Any) -> Any:
    options = {name: changes.pop(name) for name in ("top_k", "draws", "ensemble_weights") if name in changes}
    return load_logit_dataset(ensemble=paths, **options).stream(**{"batch_size": 5, "seed": 1, **changes})


@pytest.mark.parametrize("shape", [{}, {"pack_length": 48}, {"shuffle": False}])
def test_batches_are_those_of_the_first_dataset_with_the_targets_of_each(grouped, second, shape):
    rows = {row.sample_id: row for row in open_dataset(second).rows()}
    alone = load_logit_dataset(grouped).stream(batch_size=5, seed=1, **shape)
    pairs = list(islice(zip(alone, stream_of(grouped, second, **shape), strict=False), 20))
    assert len(pairs) == 20
    for wanted, found in pairs:
        targets = found["targets"]
        assert same(targets.teachers[0], wanted["targets"])
        for name in ("input_ids", "labels", "sample_ids", "position_ids"):
            assert same(found[name], wanted[name])
        of_other = [rows[name] for name in found["sample_ids"]]
        if "pack_length" not in shape:
            assert same(targets.teachers[1], collate(of_other)["targets"])
            continue
        # The rows of a pack follow each other; the place of a target tells its pack.
        packs: list[list[CachedRow]] = [[] for _ in found["input_ids"]]
        for number, row in enumerate(of_other):
            packs[int(targets.row[found["target_samples"] == number][0])].append(row)
        assert same(targets.teachers[1], collate_packs(packs, length=48)["targets"])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_ensemble_resumes_at_any_batch_and_ignores_the_number_of_workers(grouped, second, workers):
    whole = list(islice(stream_of(grouped, second, pack_length=48), 12))
    stream = stream_of(grouped, second, pack_length=48)
    stream.seek(json.loads(json.dumps(whole[4]["cursor"])))
    found = list(islice(DataLoader(stream, batch_size=None, num_workers=workers), 7))
    assert all_same(found, whole[5:])


def test_the_cursor_of_an_ensemble_fits_no_other_run(grouped, second):
    cursor = next(iter(stream_of(grouped, second)))["cursor"]
    others = (
        load_logit_dataset(grouped).stream(batch_size=5, seed=1),
        stream_of(grouped, grouped),
        stream_of(grouped, second, ensemble_weights=[1, 3]),
    )
    for stream in others:
        with pytest.raises(CursorMismatch, match="ensemble"):
            stream.seek(cursor)


def test_fewer_ids_and_draws_are_those_of_each_dataset_alone(grouped, second):
    found = next(iter(stream_of(grouped, second, top_k=3, draws=2, shuffle=False)))["targets"]
    for path, teacher in zip((grouped, second), found.teachers, strict=True):
        alone = load_logit_dataset(path, top_k=3, draws=2).stream(batch_size=5, seed=1, shuffle=False)
        assert same(teacher, next(iter(alone))["targets"])


def test_weights_are_divided_by_their_sum_and_equal_by_default(grouped, second):
    assert load_logit_dataset(ensemble=[grouped, second]).ensemble_weights == (0.5, 0.5)
    weighted = load_logit_dataset(ensemble=[grouped, second], ensemble_weights=[1, 3])
    assert weighted.ensemble_weights == (0.25, 0.75)
    assert weighted.dataset_ids == tuple(open_dataset(path).dataset_id for path in (grouped, second))
    assert [part.draws for part in weighted.by_teacher] == [4, 6]
    assert weighted.rows == ROWS


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, float("inf")], [1, 2, 3]])
def test_weights_that_are_none_are_a_named_error(grouped, second, weights):
    with pytest.raises(InvalidMixture, match="2 finite numbers above 0"):
        load_logit_dataset(ensemble=[grouped, second], ensemble_weights=weights)


def test_one_dataset_or_both_ways_are_a_named_error(grouped, second):
    for given in ({"ensemble": [grouped]}, {"path": grouped, "ensemble": [grouped, second]}, {}):
        with pytest.raises(InvalidMixture):
            load_logit_dataset(**given)


def test_a_row_that_one_teacher_rejected_is_named_at_the_start_and_the_fix_works(
    grouped, write_second, tmp_path, monkeypatch
):
    short = write_second(tmp_path / "short", lambda rows: rows[:10] + rows[11:])
    with pytest.raises(EnsembleMismatch) as error:
        load_logit_dataset(ensemble=[grouped, short])
    assert "row number 10" in error.value.what
    assert "'row-10' and sample id 'row-11'; 77 and 76 rows" in error.value.found
    command = error.value.fix.partition("`")[2].partition("`")[0]
    words = shlex.split(command)
    assert words[:4] == ["coldstill", "subset", open_dataset(grouped).store.url, "OUTPUT"]
    assert words[4:] == ["--filter", "sample_id != row-10"]
    subset(words[2], tmp_path / "fits", filters=[words[5]])
    fits = load_logit_dataset(ensemble=[tmp_path / "fits", short])
    assert sum(len(batch["sample_ids"]) for batch in fits.stream(batch_size=8, seed=0, epochs=1)) == ROWS - 1


def shorter(rows: list[CachedRow], number: int) -> list[CachedRow]:
    """One target fewer in a row."""
    row = rows[number]
    spans = row.target_spans.copy()
    spans[-1, 1] -= 1
    spans = spans[spans[:, 0] < spans[:, 1]]
    count = row.targets.positions - 1
    return [*rows[:number], replace(row, target_spans=spans, targets=row.targets.slice(0, count)), *rows[number + 1 :]]


def other_token(rows: list[CachedRow], number: int) -> list[CachedRow]:
    """Another first token in a row, as by another chat template; no count tells."""
    tokens = rows[number].token_ids.copy()
    tokens[0] = (tokens[0] + 1) % making.VOCABULARY
    changed = replace(rows[number], token_ids=tokens)
    positions = changed.positions
    assert 0 not in positions + 1
    return [*rows[:number], changed, *rows[number + 1 :]]


def test_other_target_spans_are_named_at_the_start(grouped, write_second, tmp_path):
    other = write_second(tmp_path / "other", lambda rows: shorter(rows, 33))
    with pytest.raises(EnsembleMismatch, match="row 'row-33'") as error:
        load_logit_dataset(ensemble=[grouped, other])
    assert "target spans" in error.value.found


@pytest.mark.parametrize("number", [0, ROWS - 1])
def test_other_tokens_of_the_first_or_last_row_are_named_at_the_start(grouped, write_second, tmp_path, number):
    other = write_second(tmp_path / "other", lambda rows: other_token(rows, number))
    with pytest.raises(EnsembleMismatch, match=f"row 'row-{number}'") as error:
        load_logit_dataset(ensemble=[grouped, other])
    assert "tokens that differ first at position 0" in error.value.found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda rows: other_token(rows, 7), "differ first at position 0"),
        (lambda rows: [*rows[:7], replace(rows[7], sample_id="else"), *rows[8:]], "sample ids 'row-7' and 'else'"),
        (lambda rows: [*rows[:7], rows[8], rows[7], *rows[9:]], "sample ids"),
    ],
)
def test_a_row_that_no_count_tells_apart_is_named_when_it_is_read(grouped, write_second, tmp_path, change, found):
    dataset = load_logit_dataset(ensemble=[grouped, write_second(tmp_path / "other", change)])
    with pytest.raises(EnsembleMismatch, match=r"row number [78]") as error:
        list(dataset.stream(batch_size=5, seed=0, epochs=1))
    assert found in error.value.found
