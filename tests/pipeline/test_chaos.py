"""Laws of exactly-once capture under kills at seeded moments; `python -m tests.chaos` is the long form."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from coldstill.storage_schema.commits import commit_name, read_commit
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import CachedRow
from coldstill.storage_schema.store import Store
from tests import making
from tests.chaos import laws
from tests.chaos.__main__ import STATE_NAME, State, main
from tests.chaos.campaigns import FORKED, RAY, VLLM, Campaign, Tally, run, shares

SEED = 1247


def _tally(campaign: Campaign, folder: Path, *, kills: int) -> Tally:
    tally = Tally()
    for _ in run(campaign, folder, kills=kills, seed=SEED, tally=tally):
        pass
    return tally


@pytest.mark.parametrize(
    ("campaign", "kills"),
    [pytest.param(campaign, kills, id=campaign.name) for campaign, kills in zip(FORKED, (18, 8, 6, 2), strict=True)],
)
def test_workers_killed_at_any_moment_lose_and_double_nothing(tmp_path: Path, campaign: Campaign, kills: int) -> None:
    if campaign.on_s3 and not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")):
        pytest.skip("no moto: no S3 server")
    tally = _tally(campaign, tmp_path, kills=kills)
    assert tally.is_lawful, tally
    assert tally.kills == kills
    assert tally.rounds >= 1


def test_drivers_and_workers_on_ray_killed_at_any_moment_lose_and_double_nothing(tmp_path: Path) -> None:
    tally = _tally(RAY, tmp_path, kills=4)
    assert tally.is_lawful, tally
    assert tally.kills == 4


@pytest.mark.slow
def test_drivers_and_workers_with_real_vllm_killed_at_any_moment_lose_and_double_nothing(tmp_path: Path) -> None:
    tally = _tally(VLLM, tmp_path, kills=2)
    assert tally.is_lawful, tally
    assert tally.kills == 2


def test_a_campaign_resumes_from_its_tally(tmp_path: Path) -> None:
    tally = Tally()
    for _ in run(FORKED[0], tmp_path, kills=4, seed=SEED, tally=tally):
        break  # as if killed after the first start
    assert tally.starts == 1
    found = Tally.model_validate_json(tally.model_dump_json())
    for _ in run(FORKED[0], tmp_path, kills=4, seed=SEED, tally=found):
        pass
    assert (found.kills, found.is_lawful, found.is_open) == (4, True, False)


@pytest.mark.slow
def test_the_command_resumes_after_a_kill_and_ends_with_all_its_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--kills", "12", "--vllm", "0", "--output", str(tmp_path / "chaos")]
    state = tmp_path / "chaos" / STATE_NAME
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (state.exists() and _kills(state) >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= _kills(state) < 12
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert '"kills": 12' in ended.stdout.splitlines()[-1]
    assert '"lost": 0, "doubled": 0, "wrong": 0' in ended.stdout.splitlines()[-1]


def _kills(state: Path) -> int:
    return sum(tally.kills for tally in State.model_validate_json(state.read_bytes()).tallies.values())


def test_the_files_of_a_campaign_that_broke_a_law_are_not_deleted(tmp_path: Path) -> None:
    broken = State(kills=3, vllm=0, seed=0, tallies={"workers": Tally(kills=3, lost=1)}, is_done=True)
    (tmp_path / STATE_NAME).write_text(broken.model_dump_json())
    with pytest.raises(SystemExit, match="a law was broken here"):
        main(["--kills", "3", "--vllm", "0", "--output", str(tmp_path)])
    assert State.model_validate_json((tmp_path / STATE_NAME).read_bytes()) == broken


def test_the_shares_add_up_to_all_kills() -> None:
    for kills in (0, 1, 34, 180):
        assert sum(shares((*FORKED, RAY), kills)) == kills
    assert shares((*FORKED, RAY), 180) == [72, 36, 27, 18, 27]


def test_half_written_files_are_reported(tiny_dataset: Path) -> None:
    store = Store(tiny_dataset)
    assert laws.half_written(store) == []
    (shard, *_) = sorted((tiny_dataset / "shards").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    assert len(laws.half_written(store)) == 3, "by the manifest, by its own name and by the record"
    shard.unlink()
    assert len(laws.half_written(store)) == 2
    shard.write_bytes(whole)
    store.put(commit_name(1), store.read(commit_name(1))[:-9])
    assert any("000001.json" in what for what in laws.half_written(store))
    store.put(commit_name(1), (read_commit(store, 0).model_dump_json()).encode())
    assert any("000001.json" in what for what in laws.half_written(store))
    (tiny_dataset / "dataset.json").write_bytes(b"{")
    assert any("dataset.json" in what for what in laws.half_written(store))


@pytest.fixture
def header(tokenizer_folder: Path) -> DatasetHeader:
    return making.tiny_header(tokenizer_folder)


def test_lost_doubled_and_different_rows_are_counted(
    tmp_path: Path, header: DatasetHeader, tokenizer_folder: Path
) -> None:
    rows = [making.random_row(np.random.default_rng(seed), f"row-{seed}") for seed in range(6)]
    other = making.random_row(np.random.default_rng(7), "row-1")

    def written(name: str, shards: list[list[CachedRow]], order: str = "fast") -> str:
        facts = header.model_copy(update={"order": order})
        making.write_dataset(tmp_path / name, shards, header=facts, tokenizer=tokenizer_folder)
        return str(tmp_path / name)

    unbroken = written("unbroken", [rows[:3], rows[3:]])
    assert laws.compare(written("same", [rows[:3], rows[3:]]), unbroken) == (0, 0, [])
    torn = laws.compare(written("torn", [rows[:2], [rows[0], *rows[3:]]]), unbroken)
    assert (torn.lost, torn.doubled) == (1, 1)
    changed = laws.compare(written("changed", [[rows[0], other, rows[2]], rows[3:]]), unbroken)
    assert (changed.lost, changed.doubled) == (0, 0)
    assert any("row-1" in what for what in changed.wrong)
    exact, same = (written(name, [rows[:3], rows[3:]], "exact") for name in ("exact", "same exact"))
    assert laws.compare(same, exact) == (0, 0, [])
    Path(same, "shards", "000000-000000000000.parquet").write_bytes(b"")
    assert any("left over" in what for what in laws.compare(same, exact).wrong)
    assert any("dataset id" in what for what in laws.compare(written("less", [rows[:3]], "exact"), exact).wrong)
