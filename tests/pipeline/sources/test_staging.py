"""Laws of staging: killed at any moment, nothing half-written is visible and the next start gives the same copy."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import pytest

from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources import staging
from coldstill.pipeline.sources.source import open_source, read_index
from coldstill.pipeline.sources.staging import remove_staging
from coldstill.storage_schema.store import Store
from tests.forking import fork_server

ROWS = 20_000


def _source(folder: Path) -> SourceConfig:
    path = folder / "x.jsonl.gz"
    lines = "".join(json.dumps({"id": n, "text": f"{n * n:050d}"}) + "\n" for n in range(ROWS))
    path.write_bytes(gzip.compress(lines.encode(), 1))
    return SourceConfig(path=str(path))


def _stage(config: SourceConfig, root: str) -> None:
    staging._PART_ROWS = 1000
    open_source(config, Store(root)).plan(64)


def _parts(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "staging").iterdir()}


def test_a_staging_that_is_killed_shows_nothing_and_starts_again(tmp_path: Path) -> None:
    config = _source(tmp_path)
    _stage(config, str(tmp_path / "unbroken"))
    root = tmp_path / "dataset"
    processes = fork_server()
    moments, kills = random.Random(0), 0
    for _ in range(4):
        process = processes.Process(target=_stage, args=(config, str(root)))
        process.start()
        wanted = moments.randrange(1, 20)
        while process.is_alive() and not (root / f"staging/{wanted:06d}.parquet").exists():
            time.sleep(0.001)
        process.kill()
        process.join()
        if not (root / "staging" / "source.json").exists():
            kills += 1
            assert read_index(Store(root)) is None
    assert kills >= 2
    _stage(config, str(root))
    assert _parts(root) == _parts(tmp_path / "unbroken")


def test_what_is_staged_is_in_parts_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PART_BYTES", 100_000)
    store = Store(tmp_path / "dataset")
    source = open_source(_source(tmp_path), store)
    plan = source.plan(3000)
    assert len(store.names("staging")) > 5
    numbers = [row.number for unit in reversed(plan) for row in source.read(unit)]
    assert sorted(numbers) == list(range(ROWS))
    remove_staging(store)
    assert store.names("staging") == []
    remove_staging(store)


def test_a_second_start_does_not_stage_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "dataset")
    config = _source(tmp_path)
    plan = open_source(config, store).plan(64)
    monkeypatch.setattr("coldstill.pipeline.sources.source.stage", lambda *_: pytest.fail("staged twice"))
    assert open_source(config, store).plan(64) == plan


def test_with_a_damaged_index_the_source_is_surveyed_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "dataset")
    config = _source(tmp_path)
    plan = open_source(config, store).plan(64)
    for damage in (b"{}", b"", b"\x80"):
        store.put("staging/source.json", damage)
        again = open_source(config, store)
        assert not again.is_surveyed
        assert again.plan(64) == plan
