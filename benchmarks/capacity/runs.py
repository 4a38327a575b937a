"""Text, teachers of four sizes, their caches and students of the capacity benchmark, in one output folder.

What exists is kept, so a second start makes the missing parts only.

Shape letters: `T` tokens, `M` target positions, `V` vocabulary.
"""

from __future__ import annotations

import json
import shutil
import time
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.capacity.plan import LOSSES, MORE_TEXT, SETTINGS, STUDENT, STUDIED, TEACHERS, Run, Size
from benchmarks.common.capture_here import capture_here
from benchmarks.common.held_out import HeldOut, held_out, rounded, student_figures, teacher_figures
from benchmarks.common.whole_teacher import HiddenStates, head_of, hidden_states, rows_of_text
from benchmarks.inputs.cut_models import load_model
from coldstill.common.files import new_file, new_folder
from coldstill.demo.models import load_tokenizer, new_model, parameter_count, pretrain, train_tokenizer, training_blocks
from coldstill.demo.settings import Layout, Shape
from coldstill.demo.text import read_rows, write_text
from coldstill.storage_schema.dataset import open_dataset
from coldstill.trainer.config import TrainConfig
from coldstill.trainer.train import train

VOCABULARY = 2048
PIECE_CHARACTERS = 700
"""Of a piece of a module, a row of pre-training."""
PARTS = ("validation", "test")
SAMPLED_ROWS, SAMPLED_PROMPT, SAMPLED_TOKENS = 24, 24, 64
TOP_K = 128
"""K of the caches, high for this vocabulary: most losses know only the mass of the tail, so a small K would make the
benchmark compare caches instead of losses."""


class Bench:
    """The benchmark in the folder `output`."""

    def __init__(self, output: Path, size: Size):
        self.layout, self.size = Layout(output), size
        self._teachers: dict[str, Any] = {}
        self._held_out: dict[tuple[str, str], dict[str, HeldOut]] = {}

    def prepare(self) -> None:
        """Write text and tokenizer, train teachers and the student of the instruction pairs, and capture."""
        layout = self.layout
        if not layout.text.exists():
            with new_folder(layout.text) as folder:
                count = self.size.rows["instruction pairs"]
                write_text(folder, distill_rows=count, held_out_rows=2 * self.size.held_out)
        if not layout.tokenizer.exists():
            texts = (row["text"] for row in read_rows(layout.rows("teacher", "raw")))
            with new_folder(layout.tokenizer) as folder:
                train_tokenizer(texts, vocabulary=VOCABULARY).save_pretrained(folder)
        for name in self.size.teachers:
            self._model(self.teacher(name), TEACHERS[name], tokens=self.size.teacher_tokens)
        better = self.size.better_teacher
        self._model(self.teacher(better), TEACHERS[better.removesuffix(MORE_TEXT)], tokens=self.size.better_tokens)
        self._model(self.student("instruction pairs", 0), STUDENT, tokens=self.size.student_tokens)
        for seed in range(self.size.seeds):
            self._model(self.student("pre-training", seed), STUDENT, tokens=0, seed=seed)
        for setting in SETTINGS:
            for name in (*self.size.teachers, self.size.better_teacher):
                self._capture(setting, name)
                _ = self.held_out(setting, name)

    def teacher(self, name: str) -> Path:
        """Folder of the teacher."""
        return self.layout.root / f"teacher_{name}"

    def student(self, setting: str, seed: int) -> Path:
        """Folder of the student before training: random weights, or one that has read text and pairs already."""
        return self.layout.root / (f"student_{seed}" if setting == "pre-training" else "student_pretrained")

    def dataset(self, setting: str, teacher: str) -> Path:
        """The cache of this teacher."""
        return self.layout.root / "captures" / f"{setting}, {teacher}"

    def run(self, run: Run) -> dict[str, Any]:
        """Train and measure a student and return its figures. Its folder is removed."""
        began = time.monotonic()
        folder = self.layout.root / "runs" / run.folder
        summary = train(self.config(run, folder))
        model = load_model(folder / "student")
        parts = self.held_out(run.setting, run.teacher)
        record = {
            **vars(run),
            "validation": rounded(student_figures(model, parts["validation"])),
            "test": {**rounded(student_figures(model, parts["test"])), **self._own_text(model, run)},
            "targets": summary.targets,
            "taid_t": summary.taid_t,
            "seconds": round(time.monotonic() - began, 1),
        }
        shutil.rmtree(folder)
        return record

    def config(self, run: Run, folder: Path) -> TrainConfig:
        """Settings of a run. Sides differ in their loss and learning rate only."""
        document = {
            "dataset": str(self.dataset(run.setting, run.teacher)),
            "output": str(folder),
            "student": {"model": str(self.student(run.setting, run.seed))},
            "loss": {**LOSSES, **STUDIED}[run.loss],
            "data": {"seed": run.seed},
            "training": {
                "learning_rate": run.rate,
                "epochs": run.passes,
                "batch_size": self.size.rows_per_step[run.setting],
                "warmup_ratio": 0.05,
                "logging_steps": 20,
                "save_steps": 1_000_000,
                "dataloader_workers": 0,
                "seed": run.seed,
            },
        }
        return TrainConfig.model_validate(document)

    def facts(self) -> dict[str, Any]:
        """Models, caches and held-out parts."""
        teachers = {}
        for name in (*self.size.teachers, self.size.better_teacher):
            of_settings = {}
            for setting in SETTINGS:
                root = self.dataset(setting, name)
                header = open_dataset(str(root)).header
                part = self.held_out(setting, name)["test"]
                of_settings[setting] = {
                    "test": rounded(teacher_figures(part, top_k=header.top_k)),
                    "test_targets": len(part.labels),
                    "cache_bytes": sum(path.stat().st_size for path in (root / "shards").iterdir()),
                }
            teachers[name] = {"parameters": parameter_count(self._loaded(name)), **of_settings}
        return {
            "text": "Python's standard library",
            "vocabulary": VOCABULARY,
            "top_k": header.top_k,
            "draws": header.draws,
            "student_parameters": parameter_count(load_model(self.student("pre-training", 0))),
            "teachers": teachers,
        }

    def before(self, setting: str) -> dict[str, float]:
        """Figures of the student before training, on the test part and against the main teacher."""
        parts = self.held_out(setting, self.size.main_teacher)
        return rounded(student_figures(load_model(self.student(setting, 0)), parts["test"]))

    def held_out(self, setting: str, teacher: str) -> dict[str, HeldOut]:
        """Validation and test part with this teacher's distributions, kept in memory for the next run."""
        if (setting, teacher) not in self._held_out:
            folder, model = self.layout.root / "held_out", partial(self._loaded, teacher)
            folder.mkdir(exist_ok=True)
            found = {}
            for part in PARTS:
                name = f"{setting}, {teacher}, {part}"
                states = hidden_states(folder / f"{name}.pt", model, self._rows(setting, part))
                found[part] = held_out(states, head_of(model()), path=folder / f"{name}, borders.pt")
            self._held_out[setting, teacher] = found
        return self._held_out[setting, teacher]

    def _loaded(self, teacher: str) -> Any:
        """The teacher; the largest has 7 M parameters, so that all stay in memory."""
        if teacher not in self._teachers:
            self._teachers[teacher] = load_model(self.teacher(teacher))
        return self._teachers[teacher]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.layout.tokenizer)

    def _rows(self, setting: str, part: str) -> Any:
        """Names, tokens and target positions of a held-out part: even rows are validation, odd ones test."""
        start = PARTS.index(part)
        if setting == "pre-training":
            path = self._pieces("held_out", 2 * self.size.held_out)
            names, tokens, positions = rows_of_text(path, self._tokenizer, max_length=512)
            return names[start::2], tokens[start::2], positions[start::2]
        rows = read_rows(self.layout.rows("held_out", "pairs"))[start::2]
        tokens, positions = [], []
        for row in rows:
            encoded = self._tokenizer.apply_chat_template(
                row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            tokens.append(torch.tensor(encoded["input_ids"][:512]))
            positions.append(torch.tensor(encoded["assistant_masks"][1:512]).nonzero()[:, 0])
        return [row["id"] for row in rows], tokens, positions

    def _pieces(self, part: str, count: int) -> Path:
        """A file with `count` pieces of the part's modules, in an order that spreads each module over all."""
        path = self.layout.text / f"{part}.pieces.jsonl"
        if not path.exists():
            pieces = [
                (number, {"id": f"{row['id']}:{number}", "text": row["text"][start : start + PIECE_CHARACTERS]})
                for row in read_rows(self.layout.rows(part, "raw"))
                for number, start in enumerate(range(0, len(row["text"]) - PIECE_CHARACTERS, PIECE_CHARACTERS))
            ]
            chosen = [row for _, row in sorted(pieces, key=lambda piece: piece[0])][:count]
            with new_file(path) as beside:
                beside.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        return path

    def _model(self, folder: Path, shape: Shape, *, tokens: int, seed: int = 0) -> None:
        """Train a model on the teachers' part of the text, unless it exists; with no `tokens` it stays random."""
        if folder.exists():
            return
        model = new_model(Shape(**{**vars(shape), "seed": seed}), vocabulary=len(self._tokenizer))
        if tokens:
            blocks = self._blocks(tokens, all_modules=folder.name.endswith(MORE_TEXT))
            checkpoint = self.layout.root / f".{folder.name}.pt"
            pretrain(model, blocks, checkpoint=checkpoint, label=folder.name)
            checkpoint.unlink(missing_ok=True)
        with new_folder(folder) as beside:
            model.save_pretrained(beside)
            self._tokenizer.save_pretrained(beside)

    def _blocks(self, tokens: int, *, all_modules: bool) -> torch.Tensor:
        """A quarter of the tokens are of modules and the others of pairs after them; or `all_modules`, and then the
        pairs, in random order."""
        if not all_modules:
            return training_blocks(self.layout, self._tokenizer, tokens=tokens, seed=0)
        blocks = training_blocks(self.layout, self._tokenizer, tokens=tokens, seed=0, raw_share=1.0)
        return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]

    def _capture(self, setting: str, teacher: str) -> None:
        root = self.dataset(setting, teacher)
        if setting == "pre-training":
            source = {"path": str(self._pieces("distill", self.size.rows[setting]))}
        else:
            source = {"path": str(self.layout.rows("distill", "pairs")), "loss_on": "assistant"}
        capture_here(
            {
                "output": str(root),
                "mode": "pretrain" if setting == "pre-training" else "score",
                "source": source,
                "teacher": {
                    "model": str(self.teacher(teacher)),
                    "engine": "transformers",
                    "top_k": TOP_K,
                    "max_length": 512,
                },
                "rows_per_unit": 100,
            },
            desc=root.name,
        )

    def _own_text(self, model: Any, run: Run) -> dict[str, float]:
        """What the student writes behind the beginnings of test rows, at temperature 1.

        `distinct_bigrams`: different pairs of tokens that follow one another, of all. `teacher_log_prob`: the teacher's
        mean log-prob of the written tokens, nats.
        """
        states: HiddenStates = self.held_out(run.setting, run.teacher)["test"].states
        prompts = [
            ids[: int(at[0]) + 1] if run.setting != "pre-training" else ids[:SAMPLED_PROMPT]
            for ids, at in zip(states.tokens, states.positions, strict=True)
            if len(at)
        ][:SAMPLED_ROWS]
        teacher, sum_, count, pairs = self._loaded(run.teacher), 0.0, 0, list[tuple[int, int]]()
        torch.manual_seed(run.seed)
        for prompt in prompts:
            with torch.inference_mode():
                ids = model.generate(
                    prompt[None, -256:], do_sample=True, top_k=0, max_new_tokens=SAMPLED_TOKENS, pad_token_id=1
                )
                start = min(len(prompt), 256)
                log_p = teacher(ids).logits[0, start - 1 : -1].log_softmax(1)
            written = ids[0, start:]
            sum_ += log_p.gather(1, written[:, None]).sum().item()
            count += len(written)
            listed = written.tolist()
            pairs += pairwise(listed)
        return {
            "distinct_bigrams": round(len(set(pairs)) / max(1, len(pairs)), 4),
            "teacher_log_prob": round(sum_ / count, 4),
        }
