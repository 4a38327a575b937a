"""Distributions of two small teachers over real text, for the benchmarks of codec and loader.

The first call trains `small_language_model.py` on `machine_text.py` (about eight minutes on one core) and stores its
hidden states; later calls read them. One model gives both teachers: `flat` is the model as it is; `sharp` has its
logits divided by the temperature at which the mean entropy over the test positions is `SHARP_ENTROPY`.

Shape letters: `P` rows, `N` target positions of a row, `V` vocabulary, `H` hidden width, `K` kept ids, `D` draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.inputs import machine_text
from benchmarks.inputs.small_language_model import CONTEXT, VOCABULARY, SmallLanguageModel, train, train_tokenizer
from benchmarks.inputs.teacher_rows import DRAWS, WIDEST, WideRow, all_draws
from coldstill.common.files import new_file
from coldstill.pipeline.teachers.target_extractor import draw_uniforms, summarize
from coldstill.storage_schema.rows import TeacherTargets

RECIPE = 1
"""Version of model, text and positions. Stored files of another version are not read."""

SHARPNESSES = ("flat", "sharp")
SHARP_ENTROPY = 1.2
TRAINING_TOKENS = 1_600_000
TEST_ROWS = 60
CALIBRATION_ROWS = 16
"""Rows of other documents than the test rows, like those of a capture's calibration pass."""

WINDOWS_PER_DOCUMENT = 2
_POSITIONS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The stored parts of a trained model: `tokens int64 [P, N + 1]`, `hidden [P, N, H]` and `head [V, H]`."""

    tokens: Tensor
    hidden: Tensor
    head: Tensor
    text: str

    def logits(self, row: int, *, temperature: float) -> Iterator[Tensor]:
        """Yield `[n, V]` logits of one row, a few positions at a time."""
        yield from (part @ self.head.T / temperature for part in self.hidden[row].split(_POSITIONS_AT_ONCE))


@dataclass(frozen=True, kw_only=True)
class Distributions:
    """Rows of one sharpness: `test` to measure on, `calibration` to configure a codec. `text` is the text's digest."""

    text: str
    temperature: float
    entropy: float
    test: list[WideRow]
    calibration: list[WideRow]


def load_distributions(cache: Path) -> dict[str, Distributions]:
    """Load flat and sharp distributions from `cache`, and make the missing ones."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in SHARPNESSES if not (cache / f"{name}.{RECIPE}.npz").exists()]
    if missing:
        teacher = load_teacher(cache)
        for name in missing:
            temperature = 1.0 if name == "flat" else temperature_of(teacher, entropy=SHARP_ENTROPY)
            _save(cache / f"{name}.{RECIPE}.npz", _summaries(teacher, temperature, name))
    return {name: _distributions(cache / f"{name}.{RECIPE}.npz", name) for name in SHARPNESSES}


def load_teacher(cache: Path) -> Teacher:
    """Load the model's hidden states and head from `cache`, or train the model."""
    path = cache / f"teacher.{RECIPE}.npz"
    if not path.exists():
        _save(path, _trained())
    with np.load(path) as kept:
        arrays = {name: torch.from_numpy(kept[name]) for name in ("tokens", "hidden", "head")}
        return Teacher(**arrays, text=str(kept["text"]))


def temperature_of(teacher: Teacher, *, entropy: float) -> float:
    """The temperature at which the mean entropy over the test positions is `entropy`, in nats, within 0.005.

    Newton's method on the inverse temperature b: with logits s, H(b) = log Z(b) - b E[s] and dH/db = -b Var[s]. First
    on every tenth row, then on all.
    """
    inverse = 1.0
    for rows in (range(0, TEST_ROWS, 10), range(TEST_ROWS)):
        found, slope = _entropy(teacher, inverse, rows)
        while abs(found - entropy) > 0.005:
            inverse *= math.exp(min(0.7, max(-0.7, (entropy - found) / (slope * inverse))))
            found, slope = _entropy(teacher, inverse, rows)
    return 1 / inverse


def _trained() -> dict[str, np.ndarray]:
    documents = machine_text.documents()
    tokenizer = train_tokenizer(document.text for document in documents if not document.held_out)
    read: list[int] = []
    windows: list[list[int]] = []
    for document in documents:
        ids = tokenizer.encode(document.text).ids
        if document.held_out:
            cuts = (ids[n * (CONTEXT + 1) : (n + 1) * (CONTEXT + 1)] for n in range(WINDOWS_PER_DOCUMENT))
            windows.extend(cut for cut in cuts if len(cut) == CONTEXT + 1)
        elif len(read) < TRAINING_TOKENS:
            read.extend(ids)
    if len(windows) < TEST_ROWS + CALIBRATION_ROWS:
        raise SystemExit(
            f"this machine has text for {len(windows)} rows; the benchmark needs {TEST_ROWS + CALIBRATION_ROWS}"
        )
    torch.manual_seed(0)
    model = SmallLanguageModel()
    rows = min(len(read), TRAINING_TOKENS) // (CONTEXT + 1)
    train(model, torch.tensor(read[: rows * (CONTEXT + 1)]).view(rows, -1))
    tokens = torch.tensor(windows[: TEST_ROWS + CALIBRATION_ROWS])
    with torch.inference_mode():
        hidden = torch.cat([model(row[:, :-1]) for row in tokens.split(4)])
    return {
        "tokens": tokens.numpy(),
        "hidden": hidden.numpy(),
        "head": model.head.weight.detach().numpy(),
        "text": np.array(machine_text.digest(documents)),
    }


@torch.inference_mode()
def _entropy(teacher: Teacher, inverse: float, rows: range) -> tuple[float, float]:
    """Mean entropy at inverse temperature b over some test rows, and its derivative by b."""
    sums = [_entropy_sums(part, inverse) for row in rows for part in teacher.logits(row, temperature=1.0)]
    entropy, slope = np.sum(sums, axis=0) / (len(rows) * teacher.hidden.shape[1])
    return float(entropy), float(slope)


def _entropy_sums(logits: Tensor, inverse: float) -> tuple[float, float]:
    scores = logits - logits.amax(1, keepdim=True)
    weights = torch.exp(scores * inverse)
    total = weights.sum(1, dtype=torch.float64)
    weights *= scores
    mean = weights.sum(1, dtype=torch.float64) / total
    weights *= scores
    square = weights.sum(1, dtype=torch.float64) / total
    return float((total.log() - inverse * mean).sum()), -inverse * float((square - mean * mean).sum())


@torch.inference_mode()
def _summaries(teacher: Teacher, temperature: float, name: str) -> dict[str, np.ndarray]:
    """The wide rows of one teacher as stacked arrays."""
    columns: dict[str, list[np.ndarray]] = {}
    entropy = 0.0
    places = np.arange(CONTEXT, dtype=np.int64)
    for row in tqdm(range(len(teacher.tokens)), desc=f"{name} distributions", unit="row"):
        uniforms = draw_uniforms(places, draws=DRAWS, seed=0, sample_id=f"{name}-{row}")
        labels = teacher.tokens[row, 1:].split(_POSITIONS_AT_ONCE)
        parts = np.split(uniforms, CONTEXT // _POSITIONS_AT_ONCE)
        for logits, label, uniform in zip(teacher.logits(row, temperature=temperature), labels, parts, strict=True):
            found = summarize(
                logits, label, uniform, top_k=WIDEST, min_prob=0.0, kept_draws=DRAWS, token_count=VOCABULARY
            )
            arrays = {field: getattr(found, field) for field in ("ids", "logprobs", "log_tail", "label_logprob")}
            for field, values in {**arrays, "draws": all_draws(found, uniform)}.items():
                columns.setdefault(field, []).append(values)
            entropy += _entropy_sums(logits, 1.0)[0] if row < TEST_ROWS else 0.0
    rows = len(teacher.tokens)
    stacked = {field: np.concatenate(values).reshape(rows, CONTEXT, -1) for field, values in columns.items()}
    return {
        **stacked,
        "tokens": teacher.tokens.numpy().astype(np.int32),
        "temperature": np.array(temperature),
        "entropy": np.array(entropy / (TEST_ROWS * CONTEXT)),
        "text": np.array(teacher.text),
    }


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with new_file(path) as beside, beside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _distributions(path: Path, name: str) -> Distributions:
    with np.load(path) as kept:
        arrays = {field: kept[field] for field in kept.files}
    rows = []
    for row, tokens in enumerate(arrays["tokens"]):
        targets = TeacherTargets(
            ids=arrays["ids"][row],
            logprobs=arrays["logprobs"][row],
            counts=np.full(CONTEXT, WIDEST, np.int32),
            log_tail=arrays["log_tail"][row, :, 0],
            label_logprob=arrays["label_logprob"][row, :, 0],
            draw_ids=np.empty(0, np.int32),
            draw_counts=np.zeros(CONTEXT, np.int32),
        )
        rows.append(WideRow(sample_id=f"{name}-{row}", token_ids=tokens, targets=targets, draws=arrays["draws"][row]))
    return Distributions(
        text=str(arrays["text"]),
        temperature=float(arrays["temperature"]),
        entropy=float(arrays["entropy"]),
        test=rows[:TEST_ROWS],
        calibration=rows[TEST_ROWS:],
    )
