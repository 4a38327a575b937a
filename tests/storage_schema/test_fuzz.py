"""The mutation campaign in small, and its own laws: `python -m tests.fuzz` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.bases import Base, make_bases
from tests.fuzz.campaign import Verdict, regressions, run
from tests.fuzz.mutants import mutant
from tests.fuzz.tree import Tree

SEED = 20_261
COUNT = 500


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def test_a_changed_dataset_is_lawful_or_refused_by_name() -> None:
    verdicts = list(run([*regressions(), *((SEED, number) for number in range(COUNT))]))
    assert [verdict for verdict in verdicts if verdict.outcome == "FAULT"] == []
    assert {verdict.outcome for verdict in verdicts} == {"as before", "lawful", "named"}
    assert _share(verdicts, "named") > 0.5


def _share(verdicts: list[Verdict], outcome: str) -> float:
    return sum(verdict.outcome == outcome for verdict in verdicts) / len(verdicts)


def test_a_mutant_depends_on_its_seed_and_number_alone(bases: list[Base], tmp_path: Path) -> None:
    again = make_bases(tmp_path)
    for number in range(0, 60, 7):
        assert mutant(3, number, bases).files == mutant(3, number, again).files
    assert mutant(3, 1, bases).files != mutant(4, 1, bases).files


def test_resealing_a_sound_dataset_changes_no_shard(bases: list[Base]) -> None:
    for base in bases:
        tree = Tree(base.files)
        tree.reseal()
        assert tree.named("shards/") == Tree(base.files).named("shards/")
        assert all(tree.files[name] == base.files[name] for name in tree.named("shards/", "dataset.json", "plan"))
