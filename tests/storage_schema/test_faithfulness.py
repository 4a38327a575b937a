"""Laws of the faithfulness sample: spread evenly, the same for any number of workers, with the teacher's values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import FileDamaged
from coldstill.storage_schema.faithfulness import (
    FAITHFULNESS_NAME,
    SAMPLE_POSITIONS,
    ExactPosition,
    sample_from_bytes,
    sample_share,
    sample_to_bytes,
    storage_kl,
    take_sample,
)
from coldstill.storage_schema.header import Codec
from coldstill.storage_schema.manifest import seal
from coldstill.tools.verify import verify
from tests import making, reference


@given(units=st.integers(1, 5000))
def test_the_shares_of_all_units_are_the_sample(units: int) -> None:
    shares = [sample_share(unit, units=units) for unit in range(units)]
    assert sum(shares) == SAMPLE_POSITIONS
    assert max(shares) - min(shares) <= 1


@given(seed=st.integers(0, 1000), rows=st.integers(1, 6), count=st.integers(0, 200))
def test_positions_are_spread_over_the_targets_of_a_unit(seed: int, rows: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    made = [making.random_row(rng, f"{i}") for i in range(rows)]
    sizes = [row.targets.positions for row in made]
    sample = take_sample(made, unit=3, count=count)
    places = [sum(sizes[: exact.row]) + exact.target for exact in sample]
    assert len(places) == len(set(places)) == min(count, sum(sizes))
    assert places == sorted(places)
    if count:
        assert max(np.diff([-1, *places, sum(sizes)])) <= sum(sizes) / len(places) + 1
    for exact in sample:
        assert exact.unit == 3
        np.testing.assert_array_equal(exact.ids, made[exact.row].targets.ids[exact.target])


def _sampled(root: Path, tokenizer: Path, fidelity: str) -> list[ExactPosition]:
    rng = np.random.default_rng(1)
    header = making.tiny_header(tokenizer, codec=Codec.preset(fidelity, top_k=8))  # type: ignore[arg-type]
    shards = [[making.random_row(rng, f"{unit}-{i}") for i in range(5)] for unit in range(3)]
    store = making.begin_dataset(root, header, tokenizer, [5, 5, 5])
    for unit, rows in enumerate(shards):
        commit_unit(store, unit, rows=rows, rejects=[], header=header, environment={}, faithful_positions=11)
    seal(store)
    return sample_from_bytes(store.read(FAITHFULNESS_NAME), where="x")


@pytest.mark.parametrize("fidelity", ["fine", "coarse", "exact"])
def test_a_sealed_dataset_shows_what_storage_cost(tmp_path: Path, tokenizer_folder: Path, fidelity: str) -> None:
    sample = _sampled(tmp_path / "d", tokenizer_folder, fidelity)
    dataset = open_dataset(tmp_path / "d")
    assert len(sample) == 33
    assert not dataset.store.names("faithfulness")
    assert verify(tmp_path / "d", deep=True, progress=False) == []
    kl = [storage_kl(exact, dataset.row(dataset.first_row(exact.unit) + exact.row).targets) for exact in sample]
    assert 0 < np.mean(kl) < 3 * dataset.header.codec.mean_kl


def test_the_kl_is_that_of_plain_python() -> None:
    rng = np.random.default_rng(2)
    row = making.random_row(rng, "a", length=30)
    moved = replace(row.targets, logprobs=row.targets.logprobs + rng.normal(0, 0.1, row.targets.logprobs.shape))
    sample = take_sample([row], unit=0, count=10**6)
    found = [storage_kl(exact, moved) for exact in sample]
    np.testing.assert_allclose(found, reference.storage_kl(row.targets, moved), rtol=1e-6, atol=1e-12)


def test_a_sample_of_another_row_is_refused() -> None:
    rng = np.random.default_rng(3)
    one, other = making.random_row(rng, "a", length=9), making.random_row(rng, "b", length=9)
    with pytest.raises(FileDamaged, match="other ids"):
        storage_kl(take_sample([one], unit=0, count=1)[0], other.targets)


@pytest.mark.parametrize(
    "changes",
    [{"unit": -1}, {"row": -1}, {"target": -2}, {"ids": np.empty(0, np.int32)}, {"logprobs": np.zeros(3, np.float32)}],
)
def test_a_sample_out_of_bounds_has_a_name(changes: dict[str, object]) -> None:
    exact = ExactPosition(0, 0, 0, np.array([1, 2], np.int32), np.array([-1, -2], np.float32), -1.0)
    data = sample_to_bytes([exact._replace(**changes)])  # type: ignore[arg-type]
    with pytest.raises(FileDamaged):
        sample_from_bytes(data, where="x")
