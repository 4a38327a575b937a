"""Laws of a capture in which one file operation or one request fails; `make fault-points` tries every one."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from tests.chaos.bucket import bucket
from tests.chaos.fault_points import REQUEST_KINDS, check_local, check_s3, local_points, s3_points
from tests.chaos.one_fault import Point
from tests.faults import KINDS

SEED = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capture")


@pytest.fixture(scope="module")
def points(folder: Path) -> list[Point]:
    return local_points(folder)


def test_all_kinds_of_operations_are_points(points: list[Point]) -> None:
    """Each file of the dataset is opened, written, synced, given its name and synced with its folder."""
    operations = [point.operation for point in points[:: len(KINDS)]]
    for place in ("shards/*.parquet", "rejects/*.jsonl", "staging/source.json"):
        at = operations.index(f"rename {place}")
        part = "_run/*.part"
        assert operations[at - 3 : at + 2] == [
            f"open {part}",
            f"write {part}",
            f"sync {part}",
            f"rename {place}",
            f"sync {place.rpartition('/')[0]}",
        ]
    assert {"link commits/000003.json", "link manifest.json", "link lease.json", "remove lease.json"} <= {*operations}


@pytest.mark.parametrize("count", [9, pytest.param(60, marks=pytest.mark.slow)])
def test_a_capture_survives_a_fault_of_any_file_operation(folder: Path, points: list[Point], count: int) -> None:
    for point in random.Random(SEED + count).sample(points, count):
        assert check_local(folder, point).wrong == [], point


@pytest.mark.slow
def test_a_capture_to_s3_survives_a_fault_of_any_request(folder: Path, points: list[Point]) -> None:
    if not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")):
        pytest.skip("no moto: no S3 server")
    with bucket() as (root, environment, server):
        found = s3_points(folder, root, server, environment)
        assert {"dataset.json", "commits/000003.json", "manifest.json"} <= {point.operation for point in found}
        for kind in REQUEST_KINDS:
            for point in random.Random(SEED).sample([point for point in found if point.kind == kind], 1):
                assert check_s3(folder, root, server, environment, point).wrong == [], point


def test_a_torn_write_is_seen(folder: Path, points: list[Point]) -> None:
    """The unbroken dataset with half of a file in it breaks a law, so the laws can fail."""
    point = points[0]
    half = folder / f"{point.at}-{point.kind}"
    (half / "commits").mkdir(parents=True)
    (half / "commits" / "000000.json").write_bytes((folder / "unbroken" / "commits" / "000000.json").read_bytes()[:50])
    assert check_local(folder, point).wrong
