"""A dataset that goes or changes while a student trains, and a loader's process that is killed: named errors only."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import yaml
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import FileDamaged, FileMissing, ShardDamaged, ShardMissing, StreamDamaged
from coldstill.trainer.data.logit_dataset import load_logit_dataset
from coldstill.trainer.data.stream import PassingErrors, raising_passed
from coldstill.trainer.distill_trainer import BatchLoader
from coldstill.trainer.errors import LoaderWorkerDied
from tests import making
from tests.pipeline.buckets import s3_bucket
from tests.trainer.test_train import make_config
from tests.trainer.training import build

WORKERS = [0, 2]


def shards_of(root: Path) -> list[Path]:
    return sorted((root / "shards").iterdir())


def delete(root: Path) -> None:
    for path in shards_of(root):
        path.unlink()


def replace(root: Path) -> None:
    """Other files of the same size and time."""
    for path in shards_of(root):
        data, facts = bytearray(path.read_bytes()), path.stat()
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
        beside = path.with_name("beside")
        beside.write_bytes(data)
        os.utime(beside, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        beside.replace(path)  # at no time is there no file, which a thread that reads ahead would find


def overwrite(root: Path) -> None:
    """The same files with other bytes, of the same size and time."""
    for path in shards_of(root):
        facts = path.stat()
        with path.open("r+b") as file:
            file.seek(facts.st_size // 3)
            file.write(bytes(facts.st_size // 6))
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def truncate(root: Path) -> None:
    for path in shards_of(root):
        os.truncate(path, path.stat().st_size // 2)


def move(root: Path) -> None:
    """Files that are open stay readable, so the dataset needs more shards than a loader keeps open."""
    root.rename(root.with_name("elsewhere"))


LOSSES = {
    delete: ShardMissing,
    replace: ShardDamaged,
    overwrite: (ShardDamaged, StreamDamaged),  # the second between the check of the stamp and the read
    truncate: ShardDamaged,
    move: ShardMissing,
}


@pytest.fixture
def twelve_shards(tokenizer_folder, tmp_path) -> Path:
    rng = np.random.default_rng(3)
    shards = [[making.random_row(rng, f"row-{shard}-{row}") for row in range(2)] for shard in range(12)]
    root = tmp_path / "dataset"
    making.write_dataset(root, shards, header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder)
    return root


class At(TrainerCallback):
    """Does something after an optimizer step."""

    def __init__(self, step: int, work) -> None:
        self.step, self.work = step, work

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            self.work()


def require_plain(error: ColdstillError) -> None:
    """A message for users: what, found, wanted, do; nothing of torch's."""
    text = str(error)
    assert "Traceback" not in text
    assert "DataLoader worker process" not in text
    assert "  found:  " in text
    assert "  do:     " in text


@pytest.mark.parametrize(
    ("loss", "workers"),
    [
        (delete, 2),
        (overwrite, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((delete, 0), (overwrite, 2), (replace, 0), (replace, 2), (truncate, 0), (truncate, 2))
        ),
        *(pytest.param(move, workers, marks=pytest.mark.slow) for workers in WORKERS),
    ],
)
def test_a_local_dataset_that_goes_while_a_student_trains_is_a_named_error(
    twelve_shards, tiny_student, tmp_path, loss, workers
):
    trainer, _ = build(
        twelve_shards,
        tiny_student,
        tmp_path / "run",
        callbacks=[At(2, lambda: loss(twelve_shards))],
        max_steps=60,
        dataloader_num_workers=workers,
    )
    with pytest.raises(LOSSES[loss], match="shards/") as raised:
        trainer.train()
    require_plain(raised.value)
    assert 2 <= trainer.state.global_step < 60


@pytest.mark.parametrize(
    ("change", "error", "workers"),
    [
        ("replace", ShardDamaged, 2),
        pytest.param("delete", ShardMissing, 0, marks=pytest.mark.slow),
        pytest.param("delete", ShardMissing, 2, marks=pytest.mark.slow),
    ],
)
def test_an_object_that_goes_while_a_student_trains_is_a_named_error(
    twelve_shards, tiny_student, tmp_path, monkeypatch, change, error, workers
):
    with s3_bucket(monkeypatch) as (address, _):
        s3 = fsspec.filesystem("s3")
        s3.put(f"{twelve_shards}/", f"{address}/d/", recursive=True)
        # One byte of room: each shard is copied again in each epoch.
        dataset = load_logit_dataset(f"{address}/d", cache_dir=tmp_path / "cache", cache_bytes=1)

        def lose() -> None:
            for path in s3.ls(f"{address}/d/shards", detail=False, refresh=True):
                if change == "delete":
                    s3.rm_file(path)
                else:
                    s3.pipe_file(path, bytes(s3.size(path)))

        trainer, _ = build(
            dataset,
            tiny_student,
            tmp_path / "run",
            callbacks=[At(2, lose)],
            max_steps=120,
            dataloader_num_workers=workers,
        )
        with pytest.raises(error, match="shards/") as raised:
            trainer.train()
        require_plain(raised.value)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dataset_that_goes_while_it_is_evaluated_is_a_named_error(tiny_dataset, tiny_student, tmp_path, workers):
    trainer, _ = build(
        tiny_dataset,
        tiny_student,
        tmp_path / "run",
        eval_dataset=load_logit_dataset(tiny_dataset),
        per_device_eval_batch_size=1,
        dataloader_num_workers=workers,
    )
    delete(tiny_dataset)
    with pytest.raises(ShardMissing) as raised:
        trainer.evaluate()
    require_plain(raised.value)


@pytest.mark.slow
def test_the_command_prints_the_error_and_ends_with_1(tiny_dataset, tiny_student, tmp_path):
    config = make_config(tiny_dataset, tiny_student, tmp_path / "run")
    training = {**config.model_dump()["training"], "dataloader_workers": 2, "epochs": 40, "save_steps": 1}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**config.model_dump(), "training": training}))
    command = [sys.executable, "-m", "tests.trainer.slow_run", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1"):
            break
    delete(tiny_dataset)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "ShardMissing: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_errors_pass_from_processes_of_each_start_method(tiny_dataset, tmp_path, method):
    stream = load_logit_dataset(tiny_dataset, cache_dir=tmp_path).stream(batch_size=2, seed=0)
    delete(tiny_dataset)
    loader = DataLoader(
        PassingErrors(stream),
        batch_size=None,
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    with pytest.raises(ShardMissing) as raised:
        list(raising_passed(loader))
    require_plain(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (type(again), str(again)) == (ShardMissing, str(raised.value))


@pytest.mark.parametrize("at", ["between batches", "in a step"])
def test_a_killed_loader_process_is_a_named_error(tiny_dataset, tiny_student, tmp_path, at):
    def kill() -> None:
        for child in psutil.Process().children():
            if child.pid not in before:
                child.send_signal(signal.SIGKILL)

    before = {child.pid for child in psutil.Process().children()}
    if at == "between batches":
        arguments = TrainingArguments(str(tmp_path), dataloader_num_workers=2, use_cpu=True)
        batches = iter(BatchLoader(load_logit_dataset(tiny_dataset).stream(batch_size=2, seed=0), arguments))
        next(batches)
        kill()
        with pytest.raises(LoaderWorkerDied, match="memory") as raised:
            list(batches)
    else:
        trainer, _ = build(
            tiny_dataset,
            tiny_student,
            tmp_path,
            callbacks=[At(2, kill)],
            max_steps=60,
            dataloader_num_workers=2,
        )
        with pytest.raises(LoaderWorkerDied, match="memory") as raised:
            trainer.train()
    require_plain(raised.value)
    assert "SIGKILL" in str(raised.value)


def test_a_dataset_copied_again_while_a_student_trains_changes_nothing(tiny_dataset, tiny_student, tmp_path):
    def copy_again() -> None:
        copy = shutil.copytree(tiny_dataset, tmp_path / "again")
        shutil.rmtree(tiny_dataset)
        copy.rename(tiny_dataset)

    trainer, _ = build(tiny_dataset, tiny_student, tmp_path / "run", callbacks=[At(2, copy_again)], max_steps=15)
    trainer.train()
    assert trainer.state.global_step == 15


def test_a_tokenizer_file_that_goes_before_the_end_is_a_named_error(tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    record = next(file for file in dataset.manifest.files if file.name.startswith("tokenizer/"))
    (tiny_dataset / record.name).write_bytes(b"")
    with pytest.raises(FileDamaged):
        dataset.read_file(record)
    (tiny_dataset / record.name).unlink()
    with pytest.raises(FileMissing):
        dataset.read_file(record)
