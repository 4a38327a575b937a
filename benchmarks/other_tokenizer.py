"""A student with another tokenizer than the teacher: does the cache teach it more than the text alone?

    python -m benchmarks.other_tokenizer OUTPUT
    QUICK=1 ...          a teacher of fewer steps, one seed, two sides; nothing is stored

The text is Python's standard library. The teacher has byte-level BPE of 2,048 ids. The student is a smaller model with
random weights, and has 768 other ids, learned from other files, with numbers split into digits. The capture is a real
one; students are trained by `coldstill.train` on the same rows and steps, with three seeds:

* cross-entropy on the student's own tokens: the text alone;
* forward KL on tokens of the same bytes, and ALM on larger chunks.

Each side is trained on 400 rows in 2 passes, and on 120 rows in 12: with much text for its steps, and with little.

Prints bits per byte of held-out text. Each finished run is written to OUTPUT/runs.jsonl; a second start makes the
missing ones only.

Shape letters: `B` rows, `T` tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.report import finish
from coldstill.demo.text import module_files
from coldstill.pipeline.config import CaptureConfig
from coldstill.pipeline.prepare import prepare
from coldstill.pipeline.worker import CaptureWorker
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.plan import PLAN_NAME, plan_from_bytes

CHARACTERS = 600
"""Of a row."""
TEACHER_TOKENS, ROWS_PER_STEP = 192, 8
SIDES: dict[str, dict[str, Any]] = {
    "cross-entropy": {"name": "cross_entropy"},
    "forward KL + ALM": {"name": "forward_kl"},
}
AMOUNTS = {"400 rows, 2 passes": (400, 2), "120 rows, 12 passes": (120, 12)}
QUICK_AMOUNTS = {"160 rows, 1 pass": (160, 1)}
HELD_OUT_ROWS = 120


class Bench:
    """Text, tokenizers, teacher and captures in `folder`; what exists is kept."""

    def __init__(self, folder: Path, *, quick: bool):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._texts = _texts()
        self._tokenizer("teacher", part="teacher", vocabulary=2048, digits=False)
        self._tokenizer("student", part="distill", vocabulary=768, digits=True)
        if not (folder / "teacher" / "config.json").exists():
            self._train_teacher(steps=60 if quick else 260)
        self._held_out = self._capture("held_out", 40 if quick else HELD_OUT_ROWS)

    def run(self, amount: str, side: str, *, seed: int) -> dict[str, Any]:
        """Train a student and measure its bits per byte on held-out text."""
        from transformers import PreTrainedTokenizerFast

        from coldstill import train

        student, output = self.folder / f"student_{seed}", self.folder / "runs" / f"{amount} {side} {seed}"
        if not student.exists():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder / "tokenizer_student")
            _llama(len(tokenizer), width=96, layers=2, seed=seed).save_pretrained(student)
            tokenizer.save_pretrained(student)
        rows, passes = {**AMOUNTS, **QUICK_AMOUNTS}[amount]
        summary = train(
            {
                "dataset": str(self._capture("distill", rows)),
                "output": str(output),
                "student": {"model": str(student)},
                "loss": SIDES[side],
                "data": {"seed": seed},
                "training": {
                    "batch_size": ROWS_PER_STEP,
                    "epochs": passes,
                    "learning_rate": 3e-3,
                    "warmup_ratio": 0.05,
                    "save_steps": 1_000_000,
                    "logging_steps": 20,
                    "dataloader_workers": 0,
                    "seed": seed,
                },
            }
        )
        return {"bits_per_byte": self._measured(output / "student"), "counts": summary.other_tokenizer}

    def _measured(self, student: Path) -> float:
        from transformers import AutoModelForCausalLM, TrainingArguments

        from coldstill import DistillTrainer, load_logit_dataset

        held_out = load_logit_dataset(str(self._held_out))
        args = TrainingArguments(str(self.folder / "measured"), report_to="none", use_cpu=True)
        model = AutoModelForCausalLM.from_pretrained(student)
        trainer = DistillTrainer(model, args, train_dataset=held_out, loss="cross_entropy", eval_dataset=held_out)
        return round(trainer.evaluate()["eval_bits_per_byte"], 5)

    def _tokenizer(self, name: str, *, part: str, vocabulary: int, digits: bool) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        folder = self.folder / f"tokenizer_{name}"
        if folder.exists():
            return
        backend = Tokenizer(models.BPE())
        steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<begin>", "<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(self._texts[part][:2000], trainer)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)

    def _train_teacher(self, *, steps: int) -> None:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder / "tokenizer_teacher")
        ids = [id_ for found in tokenizer(self._texts["teacher"])["input_ids"] for id_ in found]
        count = len(ids) // TEACHER_TOKENS
        blocks = torch.tensor(ids[: count * TEACHER_TOKENS]).view(count, TEACHER_TOKENS)
        blocks = blocks[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        model = _llama(len(tokenizer), width=128, layers=3, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
        for step in tqdm(range(steps), desc="teacher"):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            rows = blocks[torch.arange(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP) % count]
            loss = model(rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        tokenizer.save_pretrained(self.folder / "teacher")
        model.save_pretrained(self.folder / "teacher")

    def _capture(self, name: str, count: int) -> Path:
        """The dataset of the first `count` rows of a part."""
        root, path = self.folder / f"{name}_{count}", self.folder / f"{name}_{count}.jsonl"
        if (root / MANIFEST_NAME).exists():
            return root
        rows = [{"id": f"{name}-{number}", "text": text} for number, text in enumerate(self._texts[name][:count])]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        teacher = {"model": str(self.folder / "teacher"), "engine": "transformers", "max_length": 1000}
        document = {
            "output": str(root),
            "mode": "pretrain",
            "source": {"path": str(path)},
            "teacher": teacher,
            "rows_per_unit": 40,
        }
        config = CaptureConfig.model_validate(document)
        prepare(config)
        worker = CaptureWorker(config)
        for unit in tqdm(plan_from_bytes(worker.store.read(PLAN_NAME), where=PLAN_NAME), desc=name, leave=False):
            worker.run(unit.index)
        seal(worker.store)
        return root


def _texts() -> dict[str, list[str]]:
    """Pieces of modules by part, in an order that spreads each module over all."""
    found: dict[str, list[tuple[int, str]]] = {"teacher": [], "distill": [], "held_out": []}
    for file in module_files():
        for number, start in enumerate(range(0, len(file.text) - CHARACTERS, CHARACTERS)):
            found[file.part].append((number, file.text[start : start + CHARACTERS]))
    return {part: [text for _, text in sorted(pieces, key=lambda it: it[0])] for part, pieces in found.items()}


def _llama(vocabulary: int, *, width: int, layers: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = width // 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def main() -> None:
    """Train the missing students, print the table, and store a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for models, captures and the log; a second start resumes")
    folder = parser.parse_args().output
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    amounts, seeds = (QUICK_AMOUNTS, 1) if quick else (AMOUNTS, 3)
    bench, log = Bench(folder, quick=quick), folder / "runs.jsonl"
    for amount, side, seed in itertools.product(amounts, SIDES, range(seeds)):
        if (amount, side, seed) not in _done(log):
            record = {"amount": amount, "side": side, "seed": seed, **bench.run(amount, side, seed=seed)}
            with log.open("a", encoding="utf-8") as lines:
                print(json.dumps(record), file=lines, flush=True)
    done = _done(log)
    figures: dict[str, Any] = {"bits_per_byte": {}, "log": list(done.values())}
    for amount in amounts:
        table = Table("side", "bits per byte", "lowest", "highest", title=f"held-out text, {amount}")
        found = {side: [done[amount, side, seed]["bits_per_byte"] for seed in range(seeds)] for side in SIDES}
        for side, values in found.items():
            table.add_row(side, *(f"{value:.4f}" for value in (statistics.mean(values), min(values), max(values))))
        Console().print(table)
        figures["bits_per_byte"][amount] = found
    finish("other_tokenizer", figures, command="make bench-other-tokenizer", quick=quick)


def _done(log: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return {(record["amount"], record["side"], record["seed"]): record for record in map(json.loads, lines)}


if __name__ == "__main__":
    main()
