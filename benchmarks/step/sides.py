"""The sides of `benchmarks.step`: writes models and a dataset into a folder, and builds each side's trainer from it.

Shape letters: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from benchmarks.inputs.tiny_teachers import config_of, header_of, units_of_rows
from benchmarks.step import CACHED, PLAIN, RESIDENT
from coldstill.pipeline.teachers.protocol import scored_of
from coldstill.pipeline.worker import load_teacher
from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.plan import PLAN_NAME, Unit, plan_to_bytes
from coldstill.storage_schema.store import Store

VOCABULARY, TOP_K, DRAWS = 32_000, 16, 64
TOKENS, BATCH = 256, 8
STUDENT = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHER = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
T = 0.4


def make_models_and_dataset(folder: Path, *, row_count: int) -> None:
    """Write `student/`, `teacher/` and `dataset/`: the teacher's distributions at all positions of random rows."""
    for name, shape, seed in (("student", STUDENT, 0), ("teacher", TEACHER, 1)):
        torch.manual_seed(seed)
        LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, max_position_embeddings=2 * TOKENS, **shape)
        ).save_pretrained(folder / name)
    header = header_of(vocabulary=VOCABULARY, top_k=TOP_K, draws=DRAWS)
    teacher = load_teacher(config_of(folder / "teacher", engine="transformers", top_k=TOP_K), header)
    (rows,) = units_of_rows(vocabulary=VOCABULARY, units=1, rows=row_count, tokens=TOKENS, target_share=1.0)
    store = Store(folder / "dataset")
    store.create(HEADER_NAME, header.to_bytes())
    store.create(PLAN_NAME, plan_to_bytes([Unit(0, 0, 0, row_count)]))
    scored = [one.row for one in scored_of(teacher.score(rows))]
    commit_unit(store, 0, rows=scored, rejects=[], header=header, environment={})
    seal(store)


def trainer_of(side: str, folder: Path, *, steps: int, callbacks: list[TrainerCallback]) -> Trainer:
    """The trainer of a side, over `steps` steps."""
    from coldstill import DistillTrainer, load_logit_dataset

    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    common: dict[str, Any] = {"model": student, "args": arguments, "callbacks": callbacks}
    dataset = str(folder / "dataset")
    if side == PLAIN:
        return Trainer(**common, train_dataset=_plain_rows(dataset), data_collator=_stacked)
    if side == RESIDENT:
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
        return _Resident(**common, train_dataset=_plain_rows(dataset), data_collator=_stacked, teacher=teacher)
    loss = "taid" if side == CACHED else "cross_entropy"
    return DistillTrainer(**common, train_dataset=load_logit_dataset(dataset), loss=loss)


def _plain_rows(dataset: str) -> list[torch.Tensor]:
    return [torch.from_numpy(row.token_ids).long() for row in open_dataset(dataset).rows()]


def _stacked(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of one length need no padding: `[B, T]`."""
    tokens = torch.stack(rows)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


class _Resident(Trainer):
    """TAID as in the paper's code: it mixes both models' logits, with the teacher in memory."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device)

    def compute_loss(self, model: Callable[..., Any], inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> Any:
        """Mean loss over all positions but the last."""
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        logits = model(**tokens).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            wanted = self.teacher(**tokens).logits[:, :-1].flatten(0, 1)
            target = torch.softmax(torch.lerp(logits.float(), wanted.float(), T), -1)
        return functional.cross_entropy(logits.float(), target)
