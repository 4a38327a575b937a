"""Batches of rows as the evaluation takes them, made by hand, one row after the other; and dense teachers for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from coldstill.storage_schema.rows import CachedRow, spans_from_mask
from coldstill.trainer.targets import SparseTargets
from tests import making

Row = tuple[CachedRow, np.ndarray]
"""A cached row and the dense teacher `float64 [N, V]` that it was made from."""


def random_rows(seed: int, count: int, *, top_k: int = 8, draws: int = 0, min_prob: float = 0.0) -> list[Row]:
    """Rows of random tokens, lengths, loss masks and teachers; draws with their log-probs."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        tokens = rng.integers(0, making.VOCABULARY, int(rng.integers(4, 24)), dtype=np.int32)
        loss_mask = rng.random(tokens.size) < 0.6
        loss_mask[-1] = True
        spans = spans_from_mask(loss_mask)
        at = np.flatnonzero(loss_mask[1:])
        probs = making.random_probs(rng, at.size, making.VOCABULARY)
        targets = making.targets_of(
            probs, tokens[at + 1], top_k=top_k, min_prob=min_prob, draws=draws, seed=n, draw_logprobs=draws > 0
        )
        rows.append((CachedRow(sample_id=f"row-{n}", token_ids=tokens, target_spans=spans, targets=targets), probs))
    return rows


def sparse_targets(rows: Sequence[CachedRow]) -> SparseTargets:
    """All that the rows know, float64 where it is not an integer; row `b` of the batch is `rows[b]`."""
    fields: dict[str, list[Any]] = {name: [] for name in SparseTargets.__dataclass_fields__}
    most = max(int(row.targets.draw_counts.max(initial=0)) for row in rows)
    for b, row in enumerate(rows):
        targets, offsets = row.targets, row.targets.draw_offsets
        for n, position in enumerate(row.positions.tolist()):
            here = slice(offsets[n], offsets[n + 1])
            count = int(targets.draw_counts[n])
            pad = [0] * (most - count)
            fields["ids"].append(targets.ids[n].tolist())
            fields["logprobs"].append(targets.logprobs[n].tolist())
            fields["log_tail"].append(float(targets.log_tail[n]))
            fields["labels"].append(int(row.token_ids[position + 1]))
            fields["label_logprob"].append(float(targets.label_logprob[n]))
            fields["draws"].append(targets.draw_ids[here].tolist() + pad)
            fields["draw_weights"].append([1 / max(count, 1)] * count + pad)
            fields["draw_logprobs"].append(
                pad + [0] * count if targets.draw_logprobs is None else targets.draw_logprobs[here].tolist() + pad
            )
            fields["row"].append(b)
            fields["position"].append(position)
    whole = {"ids", "labels", "draws", "row", "position"}
    made = {name: torch.tensor(v, dtype=torch.int64 if name in whole else torch.float64) for name, v in fields.items()}
    if any(row.targets.draw_logprobs is None for row in rows):
        made["draw_logprobs"] = None
    return SparseTargets(**made)


def padded(rows: Sequence[CachedRow]) -> dict[str, Any]:
    """One batch, a row each."""
    longest = max(row.token_ids.size for row in rows)
    input_ids, position_ids, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
    for b, row in enumerate(rows):
        size = row.token_ids.size
        input_ids[b, :size] = torch.from_numpy(row.token_ids.astype(np.int64))
        position_ids[b, :size] = torch.arange(size)
        mask[b, :size] = 1
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": mask,
        "targets": sparse_targets(rows),
        "sample_ids": [row.sample_id for row in rows],
    }


def packed(rows: Sequence[CachedRow], *, padding: int = 3) -> dict[str, Any]:
    """One batch of one pack: the rows behind one another, positions starting at 0 for each, and no mask."""
    starts = np.cumsum([0, *(row.token_ids.size for row in rows)])
    tokens = np.concatenate([*(row.token_ids for row in rows), np.zeros(padding, np.int32)]).astype(np.int64)
    positions = np.concatenate([*(np.arange(row.token_ids.size) for row in rows), np.arange(padding)])
    apart = sparse_targets(rows)
    targets = replace(
        apart, row=torch.zeros_like(apart.row), position=apart.position + torch.from_numpy(starts)[apart.row]
    )
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "targets": targets,
        "target_samples": apart.row,
        "sample_ids": [row.sample_id for row in rows],
    }


def batches_of(rows: Sequence[CachedRow], size: int, *, pack: bool = False) -> Iterator[dict[str, Any]]:
    """`rows` in order, `size` at a time."""
    make = packed if pack else padded
    for start in range(0, len(rows), size):
        yield make(rows[start : start + size])


def load(folder: Path, *, dtype: torch.dtype = torch.float64) -> Any:
    """The model at `folder`; in float64 its numbers can be compared with a reference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def student_probs(model: Any, row: CachedRow) -> np.ndarray:
    """`float64 [N, V]`: the predictions of `model` at the row's target positions, from a forward pass of this row
    alone."""
    with torch.no_grad():
        logits = model(torch.from_numpy(row.token_ids.astype(np.int64))[None]).logits[0].double()
    return logits[row.positions, : making.VOCABULARY].softmax(-1).numpy()
