"""Laws of a training in which one file operation fails; `make fault-points` tries every one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.one_fault import Point
from tests.chaos.training_points import check_training, training_points

SEED = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def points(folder: Path) -> list[Point]:
    return training_points(folder)


def test_each_file_of_a_checkpoint_and_of_the_student_is_a_point(points: list[Point]) -> None:
    operations = {point.operation for point in points}
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
        "trained_logits.safetensors",
    ):
        assert {f"write checkpoint-20/{name}", f"sync checkpoint-20/{name}"} <= operations
    assert {"rename checkpoint-20/files.json", "remove folder checkpoint-5", "rename train_summary.json"} <= operations
    assert {"write student/tokenizer.json", "rename run.json"} <= operations


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("open .run.json.*.part", "ENOSPC"),  # was a traceback
        ("sync checkpoint-20/.files.json.*.part", "kill"),  # the file went into the student's folder
    ],
)
def test_faults_that_were_once_wrong_are_right(folder: Path, points: list[Point], operation: str, kind: str) -> None:
    (point,) = (point for point in points if (point.operation, point.kind) == (operation, kind))
    assert check_training(folder, point).wrong == []


@pytest.mark.parametrize("count", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_a_training_survives_a_fault_of_any_file_operation(folder: Path, points: list[Point], count: int) -> None:
    for point in random.Random(SEED + count).sample(points, count):
        assert check_training(folder, point).wrong == [], point
