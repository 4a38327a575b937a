"""Rounds against the same number of steps on the source's own answers: the student's error on what it writes itself.

DEMO is the output folder of a finished `coldstill demo`. Teacher, student and prompts (Python functions) are those of
the demo. Each side trains the same student in three legs with the same settings, optimizer steps and rows per step:

* rounds: `coldstill rounds`, three rounds; the student answers the prompts, the teacher scores the answers;
* text: the teacher scores the source's own answers to the same prompts once, and each leg trains on that dataset.

The sides take turns leg by leg. Then each student answers held-out prompts (temperature 1), and KL(teacher || student)
over the whole vocabulary is measured on its own answers and on the held-out text. The first is what counts when the
student is used: its prefixes are its own. Rounds are better where a ratio rounds / text is below 1.

Shape letters: `B` rows, `T` tokens, `M` target positions of a batch, `V` vocabulary.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common.command import add_folders, is_quick, new_parser
from benchmarks.common.report import finish
from benchmarks.common.run_log import claim
from coldstill.common.files import new_file, read_json, write_json
from coldstill.demo.settings import MAX_TOKENS, Layout
from coldstill.demo.text import read_rows

if TYPE_CHECKING:
    import torch

ROUNDS = 3
SIDES = {"rounds": "forward_kl", "rounds, lightning_opd": "lightning_opd", "text": "forward_kl"}
"""Sides and their losses."""
BEFORE = "before"
_ROWS_PER_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained and measured. A leg is one pass over the prompts."""

    prompts: int
    held_out: int
    answer_tokens: int
    seeds: int
    learning_rate: float = 2e-3
    batch_size: int = 8


QUICK = Size(prompts=64, held_out=32, answer_tokens=48, seeds=1)
FULL = Size(prompts=256, held_out=192, answer_tokens=96, seeds=3)


class Bench:
    """The demo's models and prompts, and the runs of one output folder."""

    def __init__(self, demo: Path, output: Path, size: Size):
        self.output, self.size, self.layout = output, size, Layout(demo)
        self.prompts, self.held_out = output / "prompts.jsonl", output / "held_out.jsonl"

    def prepare(self) -> None:
        """Write the first prompts and the first held-out rows of the demo's text, which is in random order."""
        for path, part, count in (
            (self.prompts, "distill", self.size.prompts),
            (self.held_out, "held_out", self.size.held_out),
        ):
            lines = self.layout.rows(part, "pairs").read_text(encoding="utf-8").splitlines(keepends=True)[:count]
            with new_file(path) as beside:
                beside.write_text("".join(lines), encoding="utf-8")

    def leg(self, side: str, leg: int, seed: int) -> None:
        """Run one leg of a side. What is done already is passed over."""
        root = self.output / f"seed-{seed}" / side.replace(", ", "_")
        if side == "text":
            self._text_leg(root, leg, seed)
        elif not (root / f"round-{leg:02}" / "train" / "train_summary.json").exists():
            from coldstill.rounds.config import RoundsConfig
            from coldstill.rounds.run import run_rounds

            run_rounds(RoundsConfig.model_validate(self._rounds(root, side, leg + 1, seed)))

    def student(self, side: str, seed: int) -> Path:
        """The student of the last leg."""
        root = self.output / f"seed-{seed}" / side.replace(", ", "_")
        return self.layout.student if side == BEFORE else root / f"round-{ROUNDS - 1:02}" / "train" / "student"

    def _rounds(self, root: Path, side: str, rounds: int, seed: int) -> dict[str, Any]:
        return {
            "output": str(root),
            "rounds": rounds,
            "source": {"path": str(self.prompts)},
            "sampling": {"max_tokens": self.size.answer_tokens, "seed": 1000 * seed},
            "writer": {"engine": "transformers", "max_length": MAX_TOKENS},
            "teacher": self._teacher(),
            "rows_per_unit": 128,
            "student": {"model": str(self.layout.student)},
            "loss": {"name": SIDES[side]},
            "data": {"seed": 1000 * seed},
            "training": self._training(),
        }

    def _teacher(self) -> dict[str, Any]:
        model = str(self.layout.teacher)
        return {"model": model, "engine": "transformers", "top_k": 16, "draws": 64, "max_length": MAX_TOKENS}

    def _training(self) -> dict[str, Any]:
        size = self.size
        return {
            "learning_rate": size.learning_rate,
            "max_steps": size.prompts // size.batch_size,
            "batch_size": size.batch_size,
            "warmup_ratio": 0.05,
        }

    def _text_leg(self, root: Path, leg: int, seed: int) -> None:
        dataset = self.output / "text"
        capture = {
            "output": str(dataset),
            "source": {"path": str(self.prompts)},
            "teacher": self._teacher(),
            "rows_per_unit": 128,
        }
        folder = root / f"round-{leg:02}"
        student = self.layout.student if leg == 0 else root / f"round-{leg - 1:02}" / "train" / "student"
        train = {
            "dataset": str(dataset),
            "output": str(folder / "train"),
            "student": {"model": str(student)},
            "loss": {"name": SIDES["text"]},
            "data": {"seed": 1000 * seed + leg},
            "training": self._training(),
        }
        if not (dataset / "manifest.json").exists():
            _coldstill("capture", self.output / "text.yaml", capture)
        if not (folder / "train" / "train_summary.json").exists():
            _coldstill("train", folder / "train.yaml", train)

    def measure(self, side: str, seed: int) -> dict[str, float]:
        """KL(teacher || student), nats per target, on the student's own answers and on the text; both held out."""
        import torch

        from coldstill.demo.measure import batches
        from coldstill.demo.models import load_tokenizer

        teacher, student = _load(self.layout.teacher), _load(self.student(side, seed))
        rows = read_rows(self.held_out)
        tokenizer = load_tokenizer(self.layout.tokenizer)
        on_text = list(batches(rows, tokenizer))
        prompts = [
            tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            for row in rows
        ]
        torch.manual_seed(seed)
        with torch.inference_mode():
            on_own = list(_answered(student, prompts, most=self.size.answer_tokens, end=tokenizer.eos_token_id))
            kls = {
                "kl_on_own_answers": _kl(teacher, student, on_own),
                "kl_on_text": _kl(teacher, student, on_text),
                "reverse_kl_on_own_answers": _kl(student, teacher, on_own),
            }
        return {
            **kls,
            "own_answer_tokens": sum(int(mask.sum()) for _, mask in on_own) / sum(len(mask) for _, mask in on_own),
            "trained_targets": self._targets(side, seed),
        }

    def _targets(self, side: str, seed: int) -> int:
        """Targets of all legs; steps and rows are equal, and answers can be shorter than the text."""
        runs = sorted(self.student(side, seed).parents[2].glob("round-*/train/train_summary.json"))
        return 0 if side == BEFORE else sum(read_json(path)["targets"] for path in runs)


def _coldstill(command: str, path: Path, settings: dict[str, Any]) -> None:
    with new_file(path) as beside:
        beside.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "coldstill", command, str(path)], check=True)


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _answered(model: Any, prompts: Sequence[list[int]], *, most: int, end: int) -> Any:
    """Yield `tokens int64 [B, T]` of prompts with sampled answers, right-padded, and `loss_mask bool [B, T]`."""
    import torch

    ordered = sorted((ids for ids in prompts if len(ids) + most <= MAX_TOKENS), key=len)
    for start in range(0, len(ordered), _ROWS_PER_BATCH):
        batch = ordered[start : start + _ROWS_PER_BATCH]
        width = max(map(len, batch))
        tokens = torch.tensor([[end] * (width - len(ids)) + ids for ids in batch])
        attention = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        written = model.generate(
            tokens, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=most, eos_token_id=end, pad_token_id=end,
        )[:, width:]  # fmt: skip
        rows, masks = [], []
        for ids, answer in zip(batch, written.tolist(), strict=True):
            kept = answer[: answer.index(end) + 1] if end in answer else answer
            rows.append(torch.tensor([*ids, *kept]))
            masks.append(torch.tensor([False] * len(ids) + [True] * len(kept)))
        pad = torch.nn.utils.rnn.pad_sequence
        yield pad(rows, batch_first=True), pad(masks, batch_first=True)


def _kl(of: Any, to: Any, encoded: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean KL(of || to), nats per target."""
    from coldstill.demo.measure import StudentSums, target_logprobs

    sums, targets = StudentSums(), 0
    for tokens, mask in encoded:
        labels = tokens[:, 1:][mask[:, 1:]]
        sums.add(target_logprobs(of, tokens, mask), target_logprobs(to, tokens, mask), labels)
        targets += len(labels)
    return sums.means(targets)["kl_teacher_student"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing legs, measure, print the table, and store a full run."""
    parser = new_parser(
        "rounds",
        __doc__,
        make="bench-rounds DEMO=DIR OUTPUT=DIR",
        takes="hours on 2 cores",
        quick="one seed and few prompts, in about three minutes",
        result="rounds",
    )
    add_folders(parser, demo=True)
    for name in ("prompts", "held_out", "answer_tokens", "seeds"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"instead of {getattr(FULL, name)}")
    parser.add_argument("--lightning-opd", action="store_true", help="also run rounds with the loss lightning_opd")
    options, quick = parser.parse_args(arguments), is_quick()
    changed = {name: value for name, value in vars(options).items() if hasattr(FULL, name) and value is not None}
    size = replace(QUICK if quick else FULL, **changed)
    bench = Bench(options.demo.resolve(), options.output.resolve(), size)
    kept = {name: value for name, value in vars(size).items() if name != "seeds"}
    claim(bench.output, benchmark="rounds", demo=str(bench.layout.root), **kept)
    bench.prepare()
    sides = [side for side, loss in SIDES.items() if loss != "lightning_opd" or options.lightning_opd]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in (BEFORE, *sides)}
    for seed in range(bench.size.seeds):
        for leg in range(ROUNDS):
            for side in sides:
                bench.leg(side, leg, seed)
        for side in found:
            path = bench.output / f"seed-{seed}" / f"{side.replace(', ', '_')}.json"
            if not path.exists():
                write_json(path, bench.measure(side, seed))
            found[side].append(read_json(path))
    words = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    _report(found, bench.size, quick=quick, words=words)


def _report(found: dict[str, list[dict[str, float]]], size: Size, *, quick: bool, words: str) -> None:
    measures = ("kl_on_own_answers", "kl_on_text")
    columns = ("side", "KL on own answers", "KL on text", "tokens of an answer", "trained targets")
    table = Table(*columns, title="held out, nats per target")
    for side, figures in found.items():
        names = (*measures, "own_answer_tokens", "trained_targets")
        means = [statistics.mean(one[name] for one in figures) for name in names]
        table.add_row(side, f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[2]:.1f}", f"{means[3]:,.0f}")
    Console().print(table)
    ratios = {
        name: {
            side: [round(ours[name] / text[name], 4) for ours, text in zip(found[side], found["text"], strict=True)]
            for side in found
            if side not in (BEFORE, "text")
        }
        for name in measures
    }
    settings = {"rounds": ROUNDS, **vars(size)}
    finish(
        "rounds",
        {"rounds_over_text": ratios, "sides": found, "settings": json.loads(json.dumps(settings))},
        command=f"python -m benchmarks.rounds DEMO OUTPUT{words}",
        quick=quick,
    )


if __name__ == "__main__":
    main()
