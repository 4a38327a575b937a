"""A student with another tokenizer than the teacher: does the cache teach it more than the text alone?

Two texts, each with a teacher of its own: an invented language, whose entropy is known
(`benchmarks/inputs/invented_text.py`), and Python's standard library, on which a teacher this small stays weak. Teacher
and student have byte-level BPE of different sizes, learned from different texts; the student's splits numbers into
digits. Captures are real ones. Students are smaller, start from random weights, and are trained by `coldstill.train`
on the same few rows, with three seeds:

* cross-entropy on the student's own tokens: the text alone;
* forward KL where the teacher's distribution is one of the student's next token, and ALM elsewhere, with options;
* on the invented language, both losses for a student with the teacher's tokenizer. Only if forward KL wins here by more
  than the seeds differ is the teacher good enough to say anything of another tokenizer.

On the invented language each side has its own learning rate and number of passes. With seed 0 and a validation part, a
search goes from pair to pair of a grid of factors of two until all neighbors are worse; only the number of passes has
a limit. On Python, all sides have the same.

Prints bits per byte of held-out text, of students and teachers. Each finished run is written to OUTPUT/TEXT/runs.jsonl;
a second start makes the missing ones only.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.common.command import add_folders, is_quick, new_parser, set_threads
from benchmarks.common.report import finish
from benchmarks.common.run_log import append, claim, lines_of
from benchmarks.inputs.invented_text import InventedLanguage
from coldstill.common.files import new_file, new_folder
from coldstill.demo.text import module_files

TEACHER_TOKENS, ROWS_PER_STEP = 192, 8
SEEDS = 3
MOST_PASSES = 80
"""Of the search: about 600 steps of 60 rows."""


@dataclass(frozen=True)
class Side:
    """`loss`: as in a configuration. `same_tokenizer`: the student has the teacher's."""

    loss: Mapping[str, Any]
    same_tokenizer: bool = False


OTHER = {
    "cross-entropy": Side({"name": "cross_entropy"}),
    "forward KL + ALM": Side({"name": "forward_kl"}),
}
ALL = {
    **OTHER,
    "same tokenizer, cross-entropy": Side({"name": "cross_entropy"}, same_tokenizer=True),
    "same tokenizer, forward KL": Side({"name": "forward_kl"}, same_tokenizer=True),
    "forward KL + ALM, 0.3 cross-entropy": Side({"name": "forward_kl", "cross_entropy_share": 0.3}),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """One text. `texts`: by part. `vocabularies`: of teacher and student. `trials`: passes and learning rate by number
    of rows of the students' training. `search`: whether these are where each side's search begins. `held_out`: rows of
    the validation and of the test part; the first is empty without a search."""

    texts: Callable[[], dict[str, list[str]]]
    vocabularies: tuple[int, int]
    teacher_steps: int
    teacher_rate: float
    trials: Mapping[int, tuple[int, float]]
    sides: Mapping[str, Side]
    held_out: int
    search: bool


class Bench:
    """Text, tokenizers, teacher and captures of a study in `folder`; what exists is kept."""

    def __init__(self, folder: Path, study: Study):
        self.folder, self.study = folder, study
        folder.mkdir(parents=True, exist_ok=True)
        self._texts = study.texts()
        self._tokenizer("teacher", part="teacher", vocabulary=study.vocabularies[0], digits=False)
        self._tokenizer("student", part="distill", vocabulary=study.vocabularies[1], digits=True)
        if not (folder / "teacher").exists():
            self._train_teacher()

    def teacher(self) -> float:
        """Bits per byte of the test part."""
        return self._measured(self.folder / "teacher", part="held_out")

    def run(self, side: str, *, rows: int, passes: int, rate: float, seed: int) -> dict[str, Any]:
        """Train a student and measure its bits per byte of the validation and the test part."""
        from coldstill import train

        chosen = self.study.sides[side]
        student = self._student(seed, kind="teacher" if chosen.same_tokenizer else "student")
        output = self.folder / "runs" / f"{side}, {rows} rows, {passes} passes, {rate:g}, {seed}"
        summary = train(
            {
                "dataset": str(self._capture("distill", rows)),
                "output": str(output),
                "student": {"model": str(student)},
                "loss": dict(chosen.loss),
                "data": {"seed": seed},
                "training": {
                    "batch_size": ROWS_PER_STEP,
                    "epochs": passes,
                    "learning_rate": rate,
                    "warmup_ratio": 0.05,
                    "save_steps": 1_000_000,
                    "logging_steps": 20,
                    "dataloader_workers": 0,
                    "seed": seed,
                },
            }
        )
        found: dict[str, Any] = {"bits_per_byte": self._measured(output / "student", part="held_out")}
        if self.study.search:
            found["validation"] = self._measured(output / "student", part="validation")
        return {**found, "counts": summary.other_tokenizer}

    def _measured(self, model: Path, *, part: str) -> float:
        """Bits per byte of a part's text behind the first token of each row, by the model's own tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model).eval()
        nats = size = 0.0
        for text in self._texts[part][: self.study.held_out]:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.inference_mode():
                nats += network(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            size += len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode())
        return round(nats / size / math.log(2), 5)

    def _student(self, seed: int, *, kind: str) -> Path:
        from transformers import PreTrainedTokenizerFast

        folder = self.folder / f"{kind}_tokens_student_{seed}"
        if not folder.exists():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder / f"tokenizer_{kind}")
            with new_folder(folder) as beside:
                _llama(len(tokenizer), width=96, layers=2, seed=seed).save_pretrained(beside)
                tokenizer.save_pretrained(beside)
        return folder

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
        with new_folder(folder) as beside:
            PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(beside)

    def _train_teacher(self) -> None:
        import torch
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder / "tokenizer_teacher")
        ids = [id_ for found in tokenizer(self._texts["teacher"])["input_ids"] for id_ in found]
        count = len(ids) // TEACHER_TOKENS
        blocks = torch.tensor(ids[: count * TEACHER_TOKENS]).view(count, TEACHER_TOKENS)
        blocks = blocks[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        model, steps, rate = (
            _llama(len(tokenizer), width=128, layers=3, seed=0),
            self.study.teacher_steps,
            self.study.teacher_rate,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
        for step in tqdm(range(steps), desc="teacher"):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            rows = blocks[torch.arange(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP) % count]
            loss = model(rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with new_folder(self.folder / "teacher") as beside:
            tokenizer.save_pretrained(beside)
            model.save_pretrained(beside)

    def _capture(self, name: str, count: int) -> Path:
        """The dataset of the first `count` rows of a part."""
        from benchmarks.common.capture_here import capture_here

        root, path = self.folder / f"{name}_{count}", self.folder / f"{name}_{count}.jsonl"
        rows = [{"id": f"{name}-{number}", "text": text} for number, text in enumerate(self._texts[name][:count])]
        with new_file(path) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        teacher = {"model": str(self.folder / "teacher"), "engine": "transformers", "max_length": 1000}
        document = {
            "output": str(root),
            "mode": "pretrain",
            "source": {"path": str(path)},
            "teacher": teacher,
            "rows_per_unit": 40,
        }
        capture_here(document, desc=name)
        return root


def _python() -> dict[str, list[str]]:
    """Pieces of 600 characters of modules by part, in an order that spreads each module over all."""
    found: dict[str, list[tuple[int, str]]] = {"teacher": [], "distill": [], "held_out": []}
    for file in module_files():
        for number, start in enumerate(range(0, len(file.text) - 600, 600)):
            found[file.part].append((number, file.text[start : start + 600]))
    return {part: [text for _, text in sorted(pieces, key=lambda it: it[0])] for part, pieces in found.items()}


def _invented(teacher_rows: int) -> dict[str, list[str]]:
    language = InventedLanguage()
    counts = {"teacher": teacher_rows, "distill": 1000, "validation": 100, "held_out": 100}
    return {
        part: language.texts(count, characters=400, seed=number) for number, (part, count) in enumerate(counts.items())
    }


def _llama(vocabulary: int, *, width: int, layers: int, seed: int) -> Any:
    import torch
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


STUDIES = {
    "invented language": Study(
        texts=partial(_invented, 12_000),
        vocabularies=(1024, 512),
        teacher_steps=1200,
        teacher_rate=4e-3,
        trials={60: (40, 4e-3)},
        sides=ALL,
        held_out=100,
        search=True,
    ),
    "Python": Study(
        texts=_python,
        vocabularies=(2048, 768),
        teacher_steps=260,
        teacher_rate=3e-3,
        trials={400: (2, 3e-3), 120: (12, 3e-3)},
        sides=OTHER,
        held_out=120,
        search=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the missing students, print the tables, and store a full run."""
    parser = new_parser(
        "other_tokenizer",
        __doc__,
        make="bench-other-tokenizer OUTPUT=DIR",
        takes="hours on 2 cores",
        quick="weaker teachers, one seed, fewer sides, no search",
        result="other_tokenizer",
    )
    add_folders(parser)
    folder, quick = parser.parse_args(arguments).output, is_quick()
    claim(folder, benchmark="other_tokenizer", quick=quick)
    set_threads()
    figures = {
        name: _figures(name, _quick(study) if quick else study, folder / name, quick=quick)
        for name, study in STUDIES.items()
    }
    finish("other_tokenizer", figures, command="make bench-other-tokenizer", quick=quick)


def _quick(study: Study) -> Study:
    rows = min(study.trials)
    texts = partial(_invented, 1200) if study.search else study.texts
    trials = {rows: (4, study.trials[rows][1])}
    return replace(study, texts=texts, teacher_steps=60, trials=trials, sides=OTHER, held_out=20, search=False)


def _figures(name: str, study: Study, folder: Path, *, quick: bool) -> dict[str, Any]:
    bench, log = Bench(folder, study), folder / "runs.jsonl"
    done = {_key(record): record for record in lines_of(log)}

    def found(**what: Any) -> dict[str, Any]:
        if _key(what) not in done:
            done[_key(what)] = {**what, **bench.run(**what)}
            append(log, done[_key(what)])
        return done[_key(what)]

    figures: dict[str, Any] = {"teacher": bench.teacher(), "students": {}}
    if isinstance(study.texts, partial):
        figures["entropy_of_the_source"] = round(InventedLanguage().entropy(), 5)
    for rows, start in study.trials.items():
        title = f"{name}, {rows} rows; teacher {figures['teacher']:.4f}"
        table = Table("side", "passes", "rate", "bits per byte", "lowest", "highest", title=title)
        for side in study.sides:
            seen = partial(found, side=side, rows=rows)
            passes, rate = best_neighbor(partial(_validation, seen), *start) if study.search else start
            runs = [seen(passes=passes, rate=rate, seed=seed) for seed in range(1 if quick else SEEDS)]
            values = [run["bits_per_byte"] for run in runs]
            numbers = (f"{value:.4f}" for value in (statistics.mean(values), min(values), max(values)))
            table.add_row(side, str(passes), f"{rate:g}", *numbers)
            figures["students"].setdefault(f"{rows} rows", {})[side] = {
                "passes": passes,
                "rate": rate,
                "bits_per_byte": values,
            }
        Console().print(table)
    return {**figures, "log": list(done.values())}


def best_neighbor(value: Callable[[int, float], float], passes: int, rate: float) -> tuple[int, float]:
    """The pair `(passes, rate)` whose neighbors, at half and twice of either, all have a higher `value`.

    `passes` stays within 1 and `MOST_PASSES`."""
    while True:
        near = [(passes, rate), (passes, rate * 2), (passes, rate / 2), (passes * 2, rate), (passes // 2, rate)]
        best = min((pair for pair in near if 1 <= pair[0] <= MOST_PASSES), key=lambda pair: value(*pair))
        if best == (passes, rate):
            return best
        passes, rate = best


def _validation(seen: Callable[..., dict[str, Any]], passes: int, rate: float) -> float:
    return float(seen(passes=passes, rate=rate, seed=0)["validation"])


def _key(record: Mapping[str, Any]) -> str:
    return str([record[name] for name in ("side", "rows", "passes", "rate", "seed")])


if __name__ == "__main__":
    main()
