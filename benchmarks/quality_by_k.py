"""How much of its teacher must a cache keep? The demo's pair, trained with forward KL from caches of several sizes.

    python -m benchmarks.quality_by_k DEMO        DEMO: the output folder of a finished `coldstill demo`
    QUICK=1 ...                                   a fifth of the steps and one order of rows; nothing is stored

Sides, interleaved, each from the same student over the same rows: plain cross-entropy; the K + 1 bucket for several K;
K = 16 with 64 draws per position and the mixture tail; the teacher's dense distributions. The targets come from the
transformers engine, the losses are the trainer's. Printed: held-out KL(teacher || student) over the whole vocabulary,
and the share of the dense loss's gain over cross-entropy that each cache keeps.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.report import finish
from demo.measure import StudentSums, batches, target_logprobs
from demo.settings import MAX_TOKENS, Layout
from demo.text import read_rows
from demo.tokenizer import load_tokenizer
from pipeline.config import SourceConfig, TeacherConfig
from pipeline.sources.chat import SequenceMaker, TokenSequence
from pipeline.sources.readers import SourceRow
from pipeline.teachers.protocol import Teacher, load_teacher
from storage_schema import open_dataset
from storage_schema.rows import CachedRow
from trainer.losses.objective import Objective
from trainer.losses.on_logits import loss_on_logits
from trainer.losses.taid import ForwardKl
from trainer.targets import SparseTargets

ROWS_PER_STEP = 8
LEARNING_RATE = 2e-3  # the demo's


@dataclass(frozen=True)
class Cache:
    """What is kept of the teacher: `top_k` ids under the bucket, or with `draws` per position under the mixture."""

    top_k: int
    draws: int = 0

    @property
    def name(self) -> str:
        return f"K={self.top_k}" + (f", D={self.draws}" if self.draws else "")


CACHES = (Cache(32), Cache(64), Cache(128), Cache(256), Cache(16, draws=64))
YARDSTICKS = ("cross_entropy", "dense")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The demo's models, its rows for distillation, and held-out batches."""

    layout: Layout
    teacher: Any
    sequences: list[TokenSequence]
    held_out: list[tuple[torch.Tensor, torch.Tensor]]


def load_pair(folder: Path, *, rows: int, held_out_rows: int) -> Pair:
    """Models and rows of a finished demo in `folder`."""
    layout = Layout(folder)
    tokenizer = load_tokenizer(layout.tokenizer)
    maker = SequenceMaker(tokenizer, source=SourceConfig(path="rows.jsonl"), max_length=MAX_TOKENS)
    made = [maker.make(SourceRow(n, row)) for n, row in enumerate(read_rows(layout.rows("distill", "pairs"))[:rows])]
    return Pair(
        layout=layout,
        teacher=AutoModelForCausalLM.from_pretrained(layout.teacher, dtype=torch.float32).eval(),
        sequences=[sequence for sequence in made if isinstance(sequence, TokenSequence)],
        held_out=list(batches(read_rows(layout.rows("held_out", "pairs"))[:held_out_rows], tokenizer)),
    )


def cached_rows(pair: Pair, cache: Cache) -> list[CachedRow]:
    """The rows with what `cache` keeps of the teacher, by the transformers engine."""
    config = TeacherConfig(
        model=str(pair.layout.teacher), engine="transformers", top_k=cache.top_k, draws=cache.draws, min_prob=0
    )
    teacher: Teacher = load_teacher(config, open_dataset(pair.layout.dataset).header)
    targets = [teacher.score([sequence])[0] for sequence in tqdm(pair.sequences, desc=cache.name, unit="row")]
    return [
        CachedRow(sample_id=s.sample_id, token_ids=s.token_ids, target_spans=s.target_spans, targets=t)
        for s, t in zip(pair.sequences, targets, strict=True)
    ]


def train(pair: Pair, rows: list[CachedRow], loss: Callable[[torch.Tensor, Any], torch.Tensor], *, seed: int) -> Any:
    """One pass over `rows` in the order of `seed`. `loss(logits [M, V], batch)` gives the mean over targets."""
    student: Any = AutoModelForCausalLM.from_pretrained(pair.layout.student, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = len(rows) // ROWS_PER_STEP
    for step in tqdm(range(steps), leave=False):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = _batch([rows[n] for n in order[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]])
        loss(_logits(student, batch), batch).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return student.eval()


def _batch(rows: list[CachedRow]) -> dict[str, Any]:
    """Tokens padded on the right, `[B, T]`, and the targets."""
    tokens = [torch.from_numpy(row.token_ids).long() for row in rows]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
        "targets": SparseTargets.from_rows(rows),
    }


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """`[M, V]` at the target positions of a padded batch."""
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return model.lm_head(hidden[batch["targets"].row, batch["targets"].position])


def _cross_entropy(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, batch["targets"].labels)


def _from_cache(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    # Where no position has a draw the mixture is the bucket.
    targets = batch["targets"]
    return loss_on_logits(logits, targets, Objective(ForwardKl("mixture")), t=1.0, weight=1 / targets.count)[0]


@torch.inference_mode()
def held_out_kl(pair: Pair, student: Any) -> float:
    """Mean KL(teacher || student) over the whole vocabulary, nats per target."""
    sums, targets = StudentSums(), 0
    for tokens, learned in pair.held_out:
        labels = tokens[:, 1:][learned[:, 1:]]
        sums.add(target_logprobs(pair.teacher, tokens, learned), target_logprobs(student, tokens, learned), labels)
        targets += len(labels)
    return sums.means(targets)["kl_teacher_student"]


def run(pair: Pair, *, seeds: range) -> dict[str, list[float]]:
    """Held-out KL of each side, one value per seed."""

    def dense(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            wanted = torch.log_softmax(_logits(pair.teacher, batch), -1)
        return torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)

    rows = {cache.name: cached_rows(pair, cache) for cache in CACHES}
    any_rows = rows[CACHES[0].name]
    kl: dict[str, list[float]] = {}
    for seed in seeds:
        sides = {"cross_entropy": (any_rows, _cross_entropy), "dense": (any_rows, dense)}
        sides |= {name: (cached, _from_cache) for name, cached in rows.items()}
        for name, (side_rows, loss) in sides.items():
            kl.setdefault(name, []).append(held_out_kl(pair, train(pair, side_rows, loss, seed=seed)))
            print(f"seed {seed}  {name:14} {kl[name][-1]:.4f}", flush=True)
    return kl


def main() -> None:
    """Measure, print, and store a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="output folder of a finished `coldstill demo`")
    demo = parser.parse_args().demo
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    pair = load_pair(demo, rows=160 if quick else 800, held_out_rows=48 if quick else 128)
    kl = run(pair, seeds=range(1 if quick else 3))

    gains = [c - d for c, d in zip(*(kl[name] for name in YARDSTICKS), strict=True)]
    table = Table("kept", "held-out KL", "lowest", "highest", "share of dense's gain", title="forward KL from a cache")
    shares = {}
    for name, values in kl.items():
        share = [(c - v) / gain for c, v, gain in zip(kl["cross_entropy"], values, gains, strict=True)]
        shares[name] = round(statistics.mean(share), 4)
        figures = (statistics.mean(values), min(values), max(values))
        table.add_row(name, *(f"{figure:.4f}" for figure in figures), f"{shares[name]:.3f}")
    Console().print(table)
    rounded = {name: [round(value, 5) for value in values] for name, values in kl.items()}
    command = "python -m benchmarks.quality_by_k DEMO"
    finish("quality_by_k", {"share_of_dense_gain": shares, "kl": rounded}, command=command, quick=quick)


if __name__ == "__main__":
    main()
