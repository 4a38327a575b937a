"""Trainings in which one file operation fails or kills: 20 steps with a checkpoint every 5, and the finished student.

After the fault the same run is started again, and must end with the weights of an unbroken one. A run that fails must
name its error. `python -m tests.chaos.training_points` tries all points and stores the counts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common.report import finish
from coldstill.trainer import finished_student
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.train import train
from tests import making

from .one_fault import AT_ONCE, Checked, Ended, Point, counts, run

_BUFFER_BYTES = 1 << 20
"""torch writes a tensor at a time; this many bytes are one write here, so that there are fewer points."""


def settings(folder: Path, output: str) -> TrainConfig:
    """20 steps on a tiny dataset, into `folder / output`."""
    if not (folder / "student").exists():
        making.tiny_llama(folder / "student")
        rng = np.random.default_rng(0)
        rows = [making.random_row(rng, f"row-{number}") for number in range(8)]
        header = making.tiny_header(folder / "student")
        making.write_dataset(folder / "dataset", [rows], header=header, tokenizer=folder / "student")
    training: dict[str, Any] = {"batch_size": 2, "max_steps": 20, "save_steps": 5, "logging_steps": 10}
    return TrainConfig.model_validate(
        {
            "dataset": str(folder / "dataset"),
            "student": {"model": str(folder / "student")},
            "output": str(folder / output),
            "training": {**training, "dataloader_workers": 0, "threads": 1},
        }
    )


def _train(config: TrainConfig) -> None:
    _write_by_python()
    train(config)


def _run(config: TrainConfig, **fault: Any) -> Ended:
    return run(partial(_train, config), config.output, **fault)


def _write_by_python() -> None:
    """Give torch and safetensors a file of Python, whose writes are counted, instead of a path."""
    import safetensors.torch
    from transformers import modeling_utils

    save = torch.save

    def save_counted(value: Any, file: Any, *args: Any, **options: Any) -> None:
        if not isinstance(file, (str, os.PathLike)):
            save(value, file, *args, **options)
            return
        with open(file, "wb", buffering=_BUFFER_BYTES) as opened:
            save(value, opened, *args, **options)

    def save_tensors(tensors: Any, filename: Any, metadata: Any = None) -> None:
        with open(filename, "wb") as opened:
            opened.write(safetensors.torch.save(tensors, metadata))

    torch.save = save_counted
    modeling_utils.safe_save_file = save_tensors  # type: ignore[assignment]
    finished_student.save_file = save_tensors  # type: ignore[attr-defined]


def training_points(folder: Path) -> list[Point]:
    """All fault points of a training, which also makes the unbroken student."""
    return _run(settings(folder, "unbroken")).points


def check_training(folder: Path, point: Point) -> Checked:
    """A training with this fault, the run that follows, and what is wrong then."""
    config = settings(folder, f"{point.at}-{point.kind}")
    first = _run(config, at=point.at, kind=point.kind)
    wrong = first.wrong_after(point)
    again = _run(config)
    if again.code:
        wrong.append(f"the next run ended with code {again.code}: {again.said}")
    elif _student(config) != _student(settings(folder, "unbroken")):
        wrong.append("another student than that of an unbroken run")
    if not wrong:
        shutil.rmtree(config.output)
    return Checked(point, first.code, wrong)


def _student(config: TrainConfig) -> dict[str, str]:
    files = sorted(Path(config.output, "student").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Try the points and print the counts. The exit code is 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.training_points", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try each EVERY-th point only (default: all)")
    every = parser.parse_args().every
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        all_points = training_points(folder)
        points = all_points[::every]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            results = threads.map(partial(check_training, folder), points)
            checked = list(tqdm(results, desc="training", total=len(points), unit=" points", mininterval=2))
    for point, _, wrong in checked:
        for what in wrong:
            print(f"{point}: {what}", file=sys.stderr)
    figures: dict[str, Any] = {
        "points": len(checked),
        "of": len(all_points),
        "wrong": sum(bool(wrong) for _, _, wrong in checked),
    }
    figures |= counts(checked)
    command = f"python -m tests.chaos.training_points --every {every}"
    finish("training_fault_points", figures, command=command, quick=False)
    return int(bool(figures["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
