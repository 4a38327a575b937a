"""Noise and bytes of drawing rules: how far what a cache keeps is from the teacher, and what it costs.

Shape letters: `N` positions of a row, `V` vocabulary, `H` width of the student's head, `D` draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.draws.plan import Control, Rule
from benchmarks.draws.rules import Kept, keep, target
from coldstill.demo.measure import batches
from coldstill.demo.models import load_tokenizer
from coldstill.demo.settings import Layout
from coldstill.demo.text import read_rows
from coldstill.storage_schema.codec import RowCodec
from coldstill.storage_schema.header import MAX_DRAWS, Codec, DatasetHeader
from coldstill.storage_schema.header_facts import TeacherFacts
from coldstill.storage_schema.rows import LOG_FLOOR, TeacherTargets

FIRST_UNTRAINED = 800
"""The runs of part 2 read the rows of the distillation part before this one; the parts to choose on are behind it.

The student `after` training is the demo's, which has read all of the part: what is chosen with it has no such promise.
"""
_RANK_ROWS = 16
_MOST_RANKED = 4096
_REPEATS = 2


@dataclass(frozen=True)
class Row:
    """Probabilities `teacher`, `student float64 [N, V]`; the student's `hidden float64 [N, H]`; `labels int64 [N]`."""

    teacher: Tensor
    student: Tensor
    hidden: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scene:
    """Rows of one teacher and student, the student's `head float64 [V, H]`, and a rank table from other rows."""

    rows: list[Row]
    head: Tensor
    ranks: tuple[int, ...]


@torch.inference_mode()
def load_scene(demo: Path, student: Path, *, divisor: float, part: str, count: int) -> Scene:
    """The first `count` rows of `held_out`, or of `choose`: rows to distill on that no run of part 2 reads.

    Raises `SystemExit` for a demo with too few rows.
    """
    torch.set_num_threads(1)
    layout = Layout(demo)
    distilled = read_rows(layout.rows("distill", "pairs"))
    unread, needed = distilled[FIRST_UNTRAINED:], FIRST_UNTRAINED + count + _RANK_ROWS
    if len(distilled) < needed:
        raise SystemExit(
            f"{demo} has {len(distilled)} rows to distill on, and the noise needs {needed}: give the output of a demo "
            "that was run without --quick"
        )
    tokenizer = load_tokenizer(layout.tokenizer)
    teacher: Any = AutoModelForCausalLM.from_pretrained(layout.teacher, dtype=torch.float32).eval()
    pupil: Any = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    wanted = unread[:count] if part == "choose" else read_rows(layout.rows("held_out", "pairs"))[:count]
    head = pupil.lm_head.weight.double()
    made = []
    for row in [*wanted, *unread[count : count + _RANK_ROWS]]:
        for tokens, mask in batches([row], tokenizer):
            at = mask[:, 1:]
            hidden = pupil.model(tokens).last_hidden_state[:, :-1][at].double()
            probs = (teacher(tokens).logits[:, :-1][at] / divisor).double().softmax(-1)
            made.append(Row(probs, (hidden @ head.T).softmax(-1), hidden, tokens[:, 1:][at]))
    rows, others = made[: -_RANK_ROWS or None], made[-_RANK_ROWS:]
    return Scene(rows, head, rank_table([row.teacher.topk(16, 1).indices.flatten() for row in others]))


def rank_table(ids: list[Tensor]) -> tuple[int, ...]:
    """All ids in `ids`, by descending frequency; at most as many as a capture's table has."""
    counts = torch.bincount(torch.cat(ids))
    order = counts.argsort(descending=True, stable=True)
    return tuple(order[counts[order] > 0][:_MOST_RANKED].tolist())


def noise_of(scene: Scene, rule: Rule, control: Control | None = None) -> dict[str, float]:
    """Mean squared error of forward KL's gradient against dense, and bytes, per position: see `NoiseSums`."""
    sums = NoiseSums(rule, control, vocabulary=len(scene.head), ranks=scene.ranks)
    for row in scene.rows:
        sums.add(row, scene.head)
    return sums.means()


class NoiseSums:
    """Sums over rows of the squared error of forward KL's gradient against dense, and of bytes, by one rule.

    `logits`: of the gradient by the logits. `hidden`: by the hidden states. `head`: by the head's weights, of one row.
    `bytes`, `bytes_coarse`: of the row codec's streams; with K = 0 those of the draws alone.
    """

    def __init__(self, rule: Rule, control: Control | None, *, vocabulary: int, ranks: tuple[int, ...]):
        self._rule, self._control = rule, control
        self._generator = torch.Generator().manual_seed(0)
        self._codecs = {name: RowCodec(_header(rule, vocabulary, ranks, name)) for name in ("fine", "coarse")}
        self._sums = dict.fromkeys(("logits", "hidden", "head", "draws", "kept", "bytes", "bytes_coarse"), 0.0)
        self._positions = 0

    def add(self, row: Row, head: Tensor) -> None:
        """Add a row; `head [V, H]` is the student's, of any dtype: a large one in float32 takes half the memory."""
        rule, sums = self._rule, self._sums
        self._positions += len(row.labels)
        for repeat in range(_REPEATS):
            kept = keep(row.teacher, rule, self._generator)
            error = target(kept, row.student, row.teacher, self._control).sub_(row.teacher)
            gram = error @ error.T
            # The squared norm of `error.T @ hidden [V, H]` without that matrix, which is 1.3 GB at V = 262,144.
            squares = {
                "logits": gram.trace(),
                "hidden": (error.to(head.dtype) @ head).square().sum(),
                "head": (gram * (row.hidden @ row.hidden.T)).sum(),
            }
            for name, value in squares.items():
                sums[name] += float(value) / _REPEATS
            if repeat == 0:
                sums["draws"] += int((kept.weights > 0).sum())
                sums["kept"] += int((kept.logprobs > -torch.inf).sum())
                for suffix, codec in (("", self._codecs["fine"]), ("_coarse", self._codecs["coarse"])):
                    streams = codec.encode(_targets(kept, row), labels=row.labels.int().numpy())
                    counted = {name: data for name, data in streams.items() if rule.top_k or name.startswith("draw")}
                    sums[f"bytes{suffix}"] += sum(map(len, counted.values()))

    def means(self) -> dict[str, float]:
        """The figures per position."""
        return {name: round(value / self._positions, 6) for name, value in self._sums.items()}


def _targets(kept: Kept, row: Row) -> TeacherTargets:
    used, drawn = kept.logprobs > -torch.inf, kept.weights > 0
    used[:, 0] = True  # the codec has no position without a kept id
    log_p = row.teacher.gather(1, row.labels[:, None])[:, 0].log().clamp(LOG_FLOOR, 0)
    return TeacherTargets(
        ids=torch.where(used, kept.ids, kept.ids[:, :1]).int().numpy(),
        logprobs=torch.where(used, kept.logprobs.clamp_min(LOG_FLOOR), -torch.inf).float().numpy(),
        counts=used.sum(1).int().numpy(),
        log_tail=kept.tail.log().clamp(LOG_FLOOR, 0).float().numpy(),
        label_logprob=log_p.float().numpy(),
        draw_ids=kept.draws[drawn].int().numpy(),
        draw_counts=drawn.sum(1).int().numpy().astype(np.int32),
    )


def _header(rule: Rule, vocabulary: int, ranks: tuple[int, ...], fidelity: Any) -> DatasetHeader:
    """Its facts about a teacher are placeholders, which the codec does not read."""
    width = max(1, rule.top_k)
    return DatasetHeader(
        codec=Codec.preset(fidelity, top_k=width),
        id_ranks=ranks,
        teacher=TeacherFacts(name="small", weights_fingerprint="0", dtype="float32", head_dtype="float32"),
        tokenizer_fingerprint="0" * 64,
        vocab_size=vocabulary,
        token_count=vocabulary,
        top_k=width,
        min_prob=rule.min_prob,
        draws=MAX_DRAWS,
        kept_draws=255,
        draw_seed=0,
        tail="exact",
        loss_on="all",
        max_length=1024,
        over_long="cut",
        rows_per_unit=1,
        source_sha256="0" * 64,
    )
