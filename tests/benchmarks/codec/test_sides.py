"""The codec's benchmark checks the codec's guarantee: a side that breaks it stops the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.codec.ours import our_sides, rival_side
from benchmarks.codec.rivals import NaiveLists
from benchmarks.codec.sides import Case, GuaranteeBroken, Side, measure
from benchmarks.inputs.teacher_rows import Limits
from coldstill.storage_schema.rows import TeacherTargets
from tests.benchmarks.making import rows


def case(top_k: int = 16) -> Case:
    """Two rows of random teachers; sharp ones, a few flat positions may have a mean KL above that of many."""
    return Case(sharpness="random", limits=Limits(top_k=top_k), rows=rows(top_k=top_k, sharpness=5))


def test_ours_from_frames_and_from_a_shard_give_the_same_and_are_timed_in_every_round() -> None:
    lines = measure([*our_sides(case(), "fine"), rival_side(case(), NaiveLists(top_k=16))], rounds=2)
    frames, shard, naive = lines
    np.testing.assert_array_equal(frames.kl, shard.kl)
    assert frames.kl.shape == naive.kl.shape == (sum(row.targets.positions for row in case().rows),)
    assert all(len(line.encode_rates) == len(line.decode_rates) == 2 for line in lines)
    assert frames.bytes_per_target > 0
    assert set(frames.streams) >= {"ids", "logprobs", "log_tail"}


def another_id(targets: TeacherTargets) -> TeacherTargets:
    ids = targets.ids.copy()
    ids[1, 2] = next(i for i in range(ids.max() + 2) if i not in ids[1])
    return replace(targets, ids=ids)


def less_mass(targets: TeacherTargets) -> TeacherTargets:
    return replace(targets, logprobs=targets.logprobs - np.float32(0.01))


def another_distribution(targets: TeacherTargets) -> TeacherTargets:
    return replace(targets, logprobs=targets.logprobs[:, ::-1])


def another_draw(targets: TeacherTargets) -> TeacherTargets:
    counts = targets.draw_counts.copy()
    counts[0] = 1
    return replace(targets, draw_counts=counts, draw_ids=np.array([3], np.int32))


@pytest.mark.parametrize(
    ("change", "named"),
    [(another_id, "kept ids"), (less_mass, "mass"), (another_distribution, "mean KL"), (another_draw, "draws")],
)
def test_a_side_that_breaks_its_guarantee_stops_the_run(
    change: Callable[[TeacherTargets], TeacherTargets], named: str
) -> None:
    side = our_sides(case(), "fine", shard=False)[0]

    def decode(data: object) -> Iterator[TeacherTargets]:
        return (change(targets) for targets in side.decode(data))  # type: ignore[arg-type]

    broken: Side = replace(side, decode=decode)
    with pytest.raises(GuaranteeBroken, match=named):
        measure([broken], rounds=0)
