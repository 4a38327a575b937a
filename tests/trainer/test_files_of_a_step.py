"""From a collated batch to the loss and its gradient is a walk through few files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainingArguments

from coldstill import DistillTrainer, load_logit_dataset
from coldstill.trainer import distill_trainer
from coldstill.trainer.data.collate import collate

ROOM = Path(distill_trainer.__file__).resolve().parent


def test_a_training_forward_runs_through_at_most_seven_files(tiny_dataset: Path, tiny_student: Path, tmp_path: Path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    dataset = load_logit_dataset(str(tiny_dataset))
    trainer = DistillTrainer(str(tiny_student), args, train_dataset=dataset, loss="taid")
    assert trainer.head.formula is not None
    batch = collate([row for row, _ in zip(dataset.sources.datasets[0].rows(), range(2), strict=False)])
    files = set()

    def seen(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename).resolve()
        if event == "call" and file.is_relative_to(ROOM):
            files.add(file.relative_to(ROOM).as_posix())

    sys.setprofile(seen)
    try:
        loss = trainer.compute_loss(trainer.model.train(), batch)
    finally:
        sys.setprofile(None)
    assert loss.requires_grad
    assert "losses/taid.py" in files
    assert len(files) <= 7, sorted(files)
