"""Trains one student from what a cache keeps of the demo's teacher, and measures its held-out KL.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `V` vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.common.capture_here import capture_here
from benchmarks.draws.comparison_losses import RenormalizedTaid
from benchmarks.draws.plan import DENSE, PLAIN, Cache, Side
from coldstill.common.files import new_file, new_folder
from coldstill.demo.measure import StudentSums, batches, target_logprobs
from coldstill.demo.models import load_tokenizer
from coldstill.demo.settings import MAX_TOKENS, Layout
from coldstill.demo.text import read_rows
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.trainer.data.collate import collate
from coldstill.trainer.loss_kernels.fused_head import loss_on_logits
from coldstill.trainer.losses.base import build_objective
from coldstill.trainer.losses.taid import Taid
from coldstill.trainer.losses.taid_schedule import TaidSchedule

ROWS_PER_STEP = 8
LEARNING_RATE = 2e-3  # the demo's


class Bench:
    """The demo's models and rows, with the teacher's logits divided by `divisor`, and captures of it in `folder`.

    Runs read the first 800 rows of the demo's distillation part once, or, with `rows` and `targets`, all rows of
    another file of chats, as often as `targets` targets take.
    """

    def __init__(
        self,
        demo: Path,
        folder: Path,
        *,
        divisor: float,
        quick: bool,
        rows: Path | None = None,
        targets: int | None = None,
    ):
        torch.set_num_threads(1)
        self.layout, self.folder = Layout(demo), folder
        self.teacher_folder = self._teacher(divisor)
        self.teacher: Any = AutoModelForCausalLM.from_pretrained(self.teacher_folder, dtype=torch.float32).eval()
        held_out = read_rows(self.layout.rows("held_out", "pairs"))[: 48 if quick else 256]
        self.held_out = list(batches(held_out, load_tokenizer(self.layout.tokenizer)))
        self.prompts = rows or self._prompts(160 if quick else 800)
        self.targets = targets

    def _teacher(self, divisor: float) -> Path:
        """Folder of the teacher with divided logits: its head's weights are divided."""
        folder = self.folder / "teacher"
        if not folder.exists():
            model: Any = AutoModelForCausalLM.from_pretrained(self.layout.teacher, dtype=torch.float32)
            if model.config.tie_word_embeddings:
                model.config.tie_word_embeddings = False
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.lm_head.weight.data.div_(divisor)
            with new_folder(folder) as beside:
                load_tokenizer(self.layout.tokenizer).save_pretrained(beside)
                model.save_pretrained(beside)
        return folder

    def _prompts(self, count: int) -> Path:
        """A file with the first `count` rows of the demo's distillation part."""
        lines = self.layout.rows("distill", "pairs").read_text(encoding="utf-8").splitlines(keepends=True)
        path = self.folder / f"{count}_rows.jsonl"
        with new_file(path) as beside:
            beside.write_text("".join(lines[:count]), encoding="utf-8")
        return path

    def rows(self, cache: Cache) -> list[CachedRow]:
        """The rows with what `cache` keeps, from a capture that runs if it does not exist yet."""
        facts = (cache.top_k, cache.draws, cache.kept_draws, cache.method, "logprobs" if cache.logprobs else None)
        root = self.folder / "_".join(["dataset", *(str(fact) for fact in facts if fact is not None)])
        self._capture(root, cache)
        return list(open_dataset(str(root)).rows())

    def _capture(self, root: Path, cache: Cache) -> None:
        source = {"path": str(self.prompts)}
        teacher = {
            "model": str(self.teacher_folder),
            "engine": "transformers",
            "top_k": cache.top_k,
            "draws": cache.draws,
            "draw_method": cache.method,
            "draw_logprobs": cache.logprobs,
            "max_length": MAX_TOKENS,
        }
        if cache.kept_draws is not None:
            teacher["kept_draws"] = cache.kept_draws
        document = {"output": str(root), "source": source, "teacher": teacher, "rows_per_unit": 160}
        capture_here(document, desc=root.name)

    def run(self, side: Side, *, seed: int) -> dict[str, float]:
        """Train the demo's student and measure its held-out KL.

        `targets` that it was trained on, of which `distinct_targets` are different places of the text.
        """
        began = time.monotonic()
        rows = self.rows(side.cache or Cache(16, 64))
        order = batches_of(rows, seed=seed, targets=self.targets)
        student = self._trained(side, rows, order)
        trained = [number for batch in order for number in batch]
        return {
            "kl": round(self._held_out_kl(student), 6),
            "seconds": round(time.monotonic() - began, 1),
            "targets": sum(len(rows[number].positions) for number in trained),
            "distinct_targets": sum(len(rows[number].positions) for number in set(trained)),
        }

    def _trained(self, side: Side, rows: list[CachedRow], order: list[list[int]]) -> Any:
        student: Any = AutoModelForCausalLM.from_pretrained(self.layout.student, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        steps, schedule = len(order), TaidSchedule()
        for step, numbers in enumerate(tqdm(order, desc=side.name, leave=False)):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = collate([rows[number] for number in numbers])
            loss = self._loss(side, student, batch, t=schedule.t)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.update(float(loss.detach()), step=step + 1, total_steps=steps)
        return student.eval()

    def _loss(self, side: Side, student: Any, batch: dict[str, Any], *, t: float) -> torch.Tensor:
        """Mean loss over the batch's targets, nats."""
        logits, targets = _logits(student, batch), batch["targets"]
        if side.cache is not None:
            loss = RenormalizedTaid() if side.renormalize else Taid(tail=side.cache.tail)
            objective = build_objective(
                loss, draws=side.cache.draws, mean_tail_mass=0.0, draw_logprobs=side.cache.logprobs
            )
            return loss_on_logits(logits, targets, objective, t=t, weight=1 / targets.count)[0]
        if side == PLAIN:
            return torch.nn.functional.cross_entropy(logits, targets.labels)
        with torch.no_grad():
            wanted = _logits(self.teacher, batch)
            if side == DENSE:
                wanted = torch.lerp(logits.detach(), wanted, t)
            wanted = wanted.log_softmax(-1)
        return torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)

    @torch.inference_mode()
    def _held_out_kl(self, student: Any) -> float:
        """Mean KL(teacher || student) over the whole vocabulary, nats per target."""
        sums, targets = StudentSums(), 0
        for tokens, loss_mask in self.held_out:
            labels = tokens[:, 1:][loss_mask[:, 1:]]
            expected = target_logprobs(self.teacher, tokens, loss_mask)
            sums.add(expected, target_logprobs(student, tokens, loss_mask), labels)
            targets += len(labels)
        return sums.means(targets)["kl_teacher_student"]


def batches_of(rows: Sequence[CachedRow], *, seed: int, targets: int | None = None) -> list[list[int]]:
    """Numbers of the rows of each step: one epoch in random order, or epochs until the steps have `targets` targets.

    Only whole batches count. Raises `ValueError` if the rows make no batch or have no target.
    """
    generator, order = torch.Generator().manual_seed(seed), list[list[int]]()
    sizes = [len(row.positions) for row in rows]
    if len(rows) < ROWS_PER_STEP or not sum(sizes):
        raise ValueError(f"{len(rows)} rows with {sum(sizes)} targets make no batch of {ROWS_PER_STEP} rows")
    done = 0
    while not order or (targets is not None and done < targets):
        shuffled = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - ROWS_PER_STEP + 1, ROWS_PER_STEP):
            if targets is None or done < targets:
                order.append(shuffled[start : start + ROWS_PER_STEP])
                done += sum(sizes[n] for n in order[-1])
    return order


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """`[M, V]` at the target positions of a padded batch."""
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return model.lm_head(hidden[batch["targets"].row, batch["targets"].position])
