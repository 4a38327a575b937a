"""The whole teacher of a benchmark: its last hidden states, computed once, and its head.

`hidden @ head.T` are the teacher's own logits. So dense sides train against the whole distribution, and students are
measured against it, at the price of one product instead of a forward pass of the teacher; the hidden states of 100,000
positions of Gemma 3 270M take 260 MB. A model whose head is more than a product is refused.

Shape letters: `B` rows, `T` tokens, `M` target positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from coldstill.common.files import new_file
from coldstill.demo.text import read_rows
from coldstill.storage_schema.dataset import open_dataset

_LARGEST_DIFFERENCE = 1e-3
"""Of the logits by formula from the model's own ones, in nats. They are the same products in another order."""


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """Rows with the teacher's last hidden states at their target positions.

    `tokens[n] int64 [T]` of row `names[n]`, and `positions[n] int64`: those whose next token is a target.
    `hidden float32 [M, D]`: of all rows, in order; those of row `n` start at `starts[n]`.
    """

    names: list[str]
    tokens: list[torch.Tensor]
    positions: list[torch.Tensor]
    hidden: torch.Tensor

    @property
    def starts(self) -> dict[str, tuple[int, int]]:
        """Name of a row -> start and stop of its positions."""
        found, start = {}, 0
        for name, positions in zip(self.names, self.positions, strict=True):
            found[name] = (start, start + len(positions))
            start += len(positions)
        return found


def rows_of_dataset(root: Path) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor]]:
    """Names, tokens and target positions of the rows of a sealed dataset."""
    rows = list(open_dataset(str(root)).rows())
    tokens = [torch.from_numpy(row.token_ids).long() for row in rows]
    return [row.sample_id for row in rows], tokens, [torch.from_numpy(row.positions).long() for row in rows]


def rows_of_text(
    path: Path, tokenizer: Any, *, max_length: int
) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor]]:
    """The same of a file of texts; every token but the first is a target. Longer rows are cut."""
    rows = read_rows(path)
    tokens = [torch.tensor(tokenizer(row["text"])["input_ids"][:max_length]) for row in rows]
    return [row["id"] for row in rows], tokens, [torch.arange(len(ids) - 1) for ids in tokens]


def hidden_states(
    path: Path, model: Callable[[], Any], rows: tuple[list[str], list[torch.Tensor], list[torch.Tensor]]
) -> HiddenStates:
    """Load the file at `path`, or compute the hidden states of `rows` and write it. `model()` loads
    the teacher. Raises `ValueError` for a file of other rows."""
    names, tokens, positions = rows
    if path.exists():
        hidden = torch.load(path, weights_only=True, mmap=True)
    else:
        hidden = last_hidden(model(), tokens, positions, desc=path.stem)
        with new_file(path) as beside:
            torch.save(hidden, beside)
    if len(hidden) != sum(map(len, positions)):
        raise ValueError(f"{path} has {len(hidden)} positions, the rows have {sum(map(len, positions))}: delete it")
    return HiddenStates(names=names, tokens=tokens, positions=positions, hidden=hidden)


@torch.inference_mode()
def last_hidden(
    model: Any, tokens: Sequence[torch.Tensor], positions: Sequence[torch.Tensor], *, desc: str
) -> torch.Tensor:
    """`float32 [M, D]`: what `model` gives its head at the target positions of each row."""
    pairs = zip(tokens, positions, strict=True)
    parts = [
        model.model(ids[None], use_cache=False).last_hidden_state[0, at].float()
        for ids, at in tqdm(pairs, desc=desc, total=len(tokens), leave=False)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def head_of(model: Any) -> torch.Tensor:
    """`float32 [V, D]`: the head's weight. Raises `ValueError` if the model's logits are not a product with it."""
    head: torch.Tensor = model.lm_head.weight
    tokens = torch.arange(8)[None] % len(head)
    difference = (
        (model(tokens).logits[0] - model.model(tokens, use_cache=False).last_hidden_state[0] @ head.T).abs().max()
    )
    if difference > _LARGEST_DIFFERENCE:
        raise ValueError(f"logits of {type(model).__name__} differ from its head's product by {difference:.2g} nats")
    return head.detach()


def in_batch(states: HiddenStates, starts: Mapping[str, tuple[int, int]], names: Sequence[str]) -> torch.Tensor:
    """`[M, D]`: the teacher's hidden states at the targets of a batch of the rows `names`, in order."""
    return torch.cat([states.hidden[slice(*starts[name])] for name in names])
