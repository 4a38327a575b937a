"""Models, capture, training and measurement of the benchmark of a real pair, in one output folder.

What exists is kept, so a second start makes the missing parts only. An interrupted capture or training run resumes.

Shape letters: `M` target positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common.held_out import HeldOut, held_out, rounded, student_figures, teacher_figures
from benchmarks.common.whole_teacher import HiddenStates, head_of, hidden_states, rows_of_dataset, rows_of_text
from benchmarks.inputs import real_model, real_text
from benchmarks.inputs.cut_models import blocks_of, load_model, make_toy, train_on_text, write_student
from benchmarks.real_pair.dense_training import train_dense
from benchmarks.real_pair.plan import HELD_OUT, Run, Side, Size, Student
from coldstill.common.files import new_file, new_folder, read_json, write_json
from coldstill.demo.text import read_rows
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.errors import VanishedGradient
from coldstill.trainer.train import TrainSummary, train

EMBEDDINGS = "embed_tokens"


class Bench:
    """The benchmark in the folder `output`."""

    def __init__(self, output: Path, size: Size, *, engine: str | None = None):
        """`engine`: of the capture; by default vllm where it is installed and the teacher is no toy."""
        self.output, self.size = output, size
        has_vllm = importlib.util.find_spec("vllm") is not None and not size.is_toy
        self.engine = engine or ("vllm" if has_vllm else "transformers")

    @property
    def dataset(self) -> Path:
        """The captured dataset."""
        return self.output / "captures" / "train"

    @property
    def capture_summary(self) -> Path:
        """The summary that the capture wrote."""
        return self.output / "captures" / "summary.json"

    def prepare(self) -> None:
        """Write rows and models and capture the teacher, unless they exist."""
        with self._alone():
            if not all(self._rows(part).exists() for part in self.size.rows):
                with_chats = not self.size.is_toy
                real_text.write_rows(self.output / "rows", self.size.rows, chats=with_chats)
            if self.size.is_toy and not self.teacher.exists():
                make_toy(self.teacher, self._rows("train"), steps=self.size.toy_steps)
            if not (self.dataset / MANIFEST_NAME).exists():
                self._capture()
            _ = self.training_states, self.parts

    @cached_property
    def teacher(self) -> Path:
        """The teacher's folder."""
        return self.output / "teacher" if self.size.is_toy else real_model.model_folder()

    def student(self, student: Student) -> Path:
        """The folder of the student before training, which is made at the first call."""
        folder = self.output / "students" / student.name
        with _locked(self.output / "students" / f"{student.name}.lock", wait=True):
            if not folder.exists():
                if student.healed:
                    self._heal(self.student(Student(student.layers, healed=False)), folder)
                else:
                    write_student(self.teacher, folder, layers=student.layers)
        return folder

    @cached_property
    def head(self) -> torch.Tensor:
        """`[V, D]`: the teacher's."""
        return head_of(self._teacher())

    @cached_property
    def training_states(self) -> HiddenStates:
        """The teacher at the targets of the dataset."""
        return hidden_states(self._states("train"), self._teacher, rows_of_dataset(self.dataset))

    @cached_property
    def parts(self) -> dict[str, HeldOut]:
        """The held-out parts."""
        from transformers import AutoTokenizer

        tokenizer, found = AutoTokenizer.from_pretrained(self.teacher), {}
        for part in HELD_OUT:
            rows = rows_of_text(self._rows(part), tokenizer, max_length=self.size.max_length)
            states = hidden_states(self._states(part), self._teacher, rows)
            found[part] = held_out(states, self.head, path=self._states(f"{part}_borders"))
        return found

    def lock(self, run: Run) -> AbstractContextManager[bool]:
        """Whether no other process has this run; none can take it until the block ends."""
        return _locked(self.output / "runs" / f"{run.folder}.lock")

    def run(self, run: Run, side: Side) -> dict[str, Any]:
        """Train and measure a student and return its figures. Call it in the block of `lock`.

        The run's folder is removed once it is measured, because a student of each run would fill the disk. `seconds`
        are those of this start: for a resumed run they are fewer than it took. A run whose gradient vanished has no
        figures: `stopped` says why.
        """
        began = time.monotonic()
        try:
            summary = self.train(run, side)
        except VanishedGradient as error:
            shutil.rmtree(self.output / "runs" / run.folder)
            return {**vars(run), "stopped": f"{type(error).__name__}: {error}"}
        folder = self.output / "runs" / run.folder
        measuring = time.monotonic()
        model = load_model(folder / "student")
        with bfloat16_factors():
            figures = {name: rounded(student_figures(model, part)) for name, part in self.parts.items()}
        now = time.monotonic()
        shutil.rmtree(folder)
        return {
            **vars(run),
            **figures,
            "targets": summary.targets,
            "taid_t": summary.taid_t,
            "targets_per_s": summary.targets_per_s,
            "wall_s": summary.wall_s,
            "measure_s": round(now - measuring, 1),
            "seconds": round(now - began, 1),
        }

    def train(self, run: Run, side: Side) -> TrainSummary:
        """Train the student of a run in its folder."""
        config = self.config(run, side)
        with bfloat16_factors():
            return train_dense(config, self.training_states, self.head) if side.dense else train(config)

    def config(self, run: Run, side: Side) -> TrainConfig:
        """Settings of a run. Sides differ in their loss and learning rate only."""
        student: dict[str, Any] = {"model": str(self.student(run.student))}
        if not self.size.embeddings:
            student["freeze"] = [EMBEDDINGS]
        training = {
            "learning_rate": run.rate,
            "max_steps": run.steps,
            "batch_size": self.size.rows_per_step,
            "warmup_ratio": 0.05,
            "logging_steps": 10,
            "save_steps": max(1, run.steps // 3),
            "dataloader_workers": 0,
        }
        document = {
            "dataset": str(self.dataset),
            "output": str(self.output / "runs" / run.folder),
            "student": student,
            "loss": side.loss,
            "data": {"seed": run.seed},
            "training": training,
        }
        return TrainConfig.model_validate(document)

    def before(self, student: Student) -> dict[str, float]:
        """Figures of the student before training, on the test part; a file keeps them."""
        path = self.output / "students" / f"{student.name}.json"
        if not path.exists():
            with bfloat16_factors():
                write_json(path, rounded(student_figures(load_model(self.student(student)), self.parts["test"])))
        return dict(read_json(path))

    def of_teacher(self, *, top_k: int) -> dict[str, float]:
        """Figures of the teacher on the test part; a file keeps them."""
        path = self.output / f"teacher_{top_k}.json"
        if not path.exists():
            with bfloat16_factors():
                write_json(path, rounded(teacher_figures(self.parts["test"], top_k=top_k)))
        return dict(read_json(path))

    def facts(self) -> dict[str, Any]:
        """What the teacher and the dataset are."""
        dataset = open_dataset(str(self.dataset))
        header = dataset.header
        files = sum(path.stat().st_size for path in (self.dataset / "shards").iterdir())
        targets = len(self.training_states.hidden)
        return {
            "teacher": header.teacher.name if self.size.is_toy else "Gemma 3 270M (Q4_K_M weights in float32)",
            "engine": self.engine,
            "top_k": header.top_k,
            "draws": header.draws,
            "draw_method": header.draw_method,
            "kept_draws": header.kept_draws,
            "vocabulary": len(self.head),
            "targets": targets,
            "bytes_per_target": round(files / targets, 1),
            "held_out_targets": {name: len(part.labels) for name, part in self.parts.items()},
            "teacher_on_test": self.of_teacher(top_k=header.top_k),
        }

    def _capture(self) -> None:
        path = self.output / "captures" / "train.yaml"
        teacher = {
            "model": str(self.teacher),
            "engine": self.engine,
            "dtype": "float32",
            "max_length": self.size.max_length,
        }
        if self.engine == "vllm":
            teacher["engine_args"] = {"enforce_eager": True}  # compiling costs minutes and saves nothing in so few
        document = {
            "output": str(self.dataset),
            "mode": "pretrain",
            "source": {"path": str(self._rows("train")), "over_long": "cut"},
            "teacher": teacher,
            "rows_per_unit": 60,
            "cluster": {"max_workers": 1},
        }
        with new_file(path) as beside:
            beside.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "coldstill", "capture", str(path), "--summary", str(self.capture_summary)]
        subprocess.run(command, check=True)

    def _heal(self, cut: Path, folder: Path) -> None:
        """Train the student in `cut` on the text of the part `healing` and write it into `folder`."""
        from transformers import AutoTokenizer

        size, tokenizer, model = self.size, AutoTokenizer.from_pretrained(cut), load_model(cut)
        texts = [row["text"] for row in read_rows(self._rows(real_text.HEALING))]
        blocks = blocks_of(texts, tokenizer, tokens=size.max_length)
        for name, weight in model.named_parameters():
            weight.requires_grad_(size.embeddings or EMBEDDINGS not in name)
        with bfloat16_factors():
            train_on_text(
                model,
                blocks,
                steps=size.healing_steps,
                blocks_per_step=size.rows_per_step,
                rate=size.healing_rate,
                desc=f"healing {folder.name}",
            )
        with new_folder(folder) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)

    def _rows(self, part: str) -> Path:
        return self.output / "rows" / f"{part}.jsonl"

    def _states(self, name: str) -> Path:
        return self.output / "teacher_states" / f"{name}.pt"

    def _teacher(self) -> Any:
        return load_model(self.teacher)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process prepares; others wait."""
        with _locked(self.output / "prepare.lock", wait=True):
            yield


@contextmanager
def bfloat16_factors() -> Iterator[None]:
    """Products of float32 matrices round their factors to bfloat16 and sum in float32, as GPUs train.

    A core with AMX multiplies so three to five times as fast. Logits change by up to 0.006 nats.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the lock at `path` could be taken; it is held until the block ends, also by a killed process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
