"""Two processes train like one: equal gradients and t, and the weights of one process that accumulates twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from coldstill import load_logit_dataset
from coldstill.trainer.sharding import end_process_group
from tests import vision
from tests.trainer.ddp_run import train, train_on_images


@pytest.fixture(scope="module")
def sealed(_sealed: Path) -> Path:
    """A dataset that no test changes."""
    return _sealed


@pytest.fixture(scope="module")
def ranks(sealed: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(sealed, tiny_student, tmp_path_factory.mktemp("ddp"))


def run_ranks(dataset: Path, student: Path, output: Path, *arguments: str, program: str = "ddp_run") -> list[dict]:
    """Results of two gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", f"tests.trainer.{program}", *map(str, (dataset, student, output)), *arguments]
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parents[2],
            # What torchrun would set; it would be a third process that imports torch.
            env={**os.environ, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "".join(error[-3000:] for error in errors)
    return [torch.load(output / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_take_the_steps_of_one_that_accumulates(ranks, sealed, tiny_student, tmp_path):
    alone = train(sealed, tiny_student, tmp_path, gradient_accumulation_steps=2)
    first, second = (found["unbroken"] for found in ranks)
    assert [rows for pair in zip(first["rows"], second["rows"], strict=True) for rows in pair] == alone["rows"]
    for mine, theirs, wanted in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-6)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(first["weights"][name], second["weights"][name], rtol=0, atol=0)
    assert (first["targets"], first["epoch"]) == (alone["targets"], alone["epoch"])
    for mine, wanted in zip(first["log"], alone["log"], strict=True):
        for key in ("loss", "bucket_kl", "taid_t", "taid_momentum"):
            assert mine[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-7)


def test_two_processes_train_on_images_also_where_one_has_none(tmp_path):
    """A row with images on one process and one without on the other, and gradient checkpointing."""
    student = vision.llava_model(tmp_path / "student")
    rows = vision.vision_rows(student, [0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 0, 0])
    dataset = vision.vision_dataset(tmp_path / "data", [rows], tokenizer=student)
    shape = {"per_device_train_batch_size": 1, "save_strategy": "no"}
    alone = train_on_images(dataset, student, tmp_path / "alone", gradient_accumulation_steps=4, **shape)
    output = tmp_path / "ddp"
    output.mkdir()
    first, second = run_ranks(dataset, student, output, "images")
    for name, weight in alone.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def test_t_is_equal_on_all_ranks(ranks):
    assert ranks[0]["unbroken"]["schedule"] == ranks[1]["unbroken"]["schedule"]


def test_an_evaluation_counts_every_row_once_on_every_rank(ranks, sealed, tiny_student, tmp_path):
    first, second = (found["unbroken"]["evaluation"] for found in ranks)
    assert first == second
    assert first["eval_targets"] == load_logit_dataset(sealed).targets


def test_killed_on_two_ranks_it_ends_with_the_weights_of_an_uninterrupted_run(ranks):
    for found in ranks:
        assert found["resumed"]["rows"] == found["unbroken"]["rows"][2:]
        assert found["resumed"]["schedule"] == found["unbroken"]["schedule"]
        for name, weight in found["unbroken"]["weights"].items():
            torch.testing.assert_close(found["resumed"]["weights"][name], weight, rtol=0, atol=0)


def test_signaled_one_after_the_other_both_ranks_save_the_same_step_and_resume(ranks):
    for found in ranks:
        assert "The checkpoint of step 3 is kept" in found["signaled"]["said"]
        assert found["signaled, resumed"]["rows"] == found["unbroken"]["rows"][3:]
        for name, weight in found["unbroken"]["weights"].items():
            torch.testing.assert_close(found["signaled, resumed"]["weights"][name], weight, rtol=0, atol=0)


def test_a_row_with_a_loss_that_is_not_finite_stops_all_ranks_and_is_named(ranks):
    assert ranks[0]["sick"] == ranks[1]["sick"]
    assert "row-" in ranks[0]["sick"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names of threads are read from /proc")
def test_a_process_that_left_its_group_has_no_thread_that_could_end_after_python():
    def threads() -> int:
        names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        return names.count("pt_gloo_runloop")

    end_process_group()  # without a group, it does nothing
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    cycle: list = [torch.distributed.group.WORLD]  # as a model in DDP holds its group
    cycle.append(cycle)
    del cycle
    until = time.monotonic() + 10  # a thread names itself a moment after it has started
    while not threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() > 0
    end_process_group()
    assert threads() == 0
    assert not torch.distributed.is_initialized()
