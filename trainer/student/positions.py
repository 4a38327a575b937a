"""Checks that the rows of a dataset fit into a student's context, before the first optimizer step.

Rotary and relative positions go on beyond the context, untrained. A table of positions ends there: a longer row ends
the training with an error of torch, in the middle of a run. So the lengths of all rows are read for such a student.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from coldstill.trainer.data.logit_dataset import LogitDataset
from coldstill.trainer.errors import RowTooLong

from .forward import innermost
from .wrapper import without_parallel

logger = logging.get_logger(__name__)


def context_of(config: Any) -> int | None:
    """Most tokens of a row of a model; None if its configuration names no number."""
    config = config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return min((limit for limit in found if type(limit) is int and limit > 0), default=None)


def table_length(model: PreTrainedModel) -> int | None:
    """Most tokens of a row of a model with a table of positions, learned or computed once; None without one."""
    context = context_of(model.config)
    decoder = model.get_decoder() or model
    if context is None:
        return None
    if model.config.model_type == "mpt":  # a bias of each position, made in the forward pass at this length
        return context
    for name, module in decoder.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("pos" in last or last == "wpe"):
            # Some leave out the first rows: by a number of their own, or up to the row of padding as RoBERTa does.
            padding = -1 if module.padding_idx is None else module.padding_idx
            return module.num_embeddings - max(getattr(module, "offset", 0), padding + 1)
    tables = [buffer for name, buffer in decoder.named_buffers() if "pos" in name.rpartition(".")[2]]
    return context if any(table.dim() == 2 and table.shape[0] == context for table in tables) else None


def virtual_tokens(model: torch.nn.Module) -> int:
    """Positions that peft's prompt learning takes from each row: those of virtual tokens, or of cached keys."""
    config: Any = getattr(without_parallel(model), "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def room_of(limit: int | None, model: torch.nn.Module) -> int | None:
    """The tokens of a row that are left of `limit` positions beside the virtual tokens of `model`; None without one."""
    return None if limit is None else limit - virtual_tokens(model)


def check_lengths(dataset: LogitDataset, model: torch.nn.Module, *, name: str) -> None:
    """Raise `RowTooLong` if a row is longer than the table of positions of the model `name`, which peft may wrap.

    For a model without a table, log a warning if rows may be longer than its context. Rows with images have another
    length for each student, and are checked when they are read. Raises what `RowReader.lengths` raises.
    """
    header = dataset.header
    inner, virtual = innermost(model), virtual_tokens(model)
    limit = room_of(table_length(inner), model)
    if limit is None:
        context = room_of(context_of(inner.config), model)
        if context is not None and context < header.max_length:
            logger.warning(
                "Rows of the dataset may have %d tokens, and the context of %s has room for %d. Longer rows teach "
                "positions that it was not made for. To leave them out: coldstill subset DATASET OUTPUT --filter "
                '"tokens <= %d"',
                header.max_length,
                name,
                context,
                context,
            )
        return
    for url, longest, longer in dataset.rows_above(limit):
        raise RowTooLong(
            f"{longer:,} rows of {url}",
            found=f"up to {longest:,} tokens",
            wanted=f"at most {limit:,}, the positions of {name}"
            + (f" beside its {virtual:,} virtual tokens" if virtual else ""),
            fix=f'leave them out: coldstill subset {url} OUTPUT --filter "tokens <= {limit}"; or choose a student with '
            "a longer context",
        )
