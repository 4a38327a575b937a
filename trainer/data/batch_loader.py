"""`BatchLoader`: a device's batches of a stream, decoded in the processes that the training arguments set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from coldstill.trainer.interruption import outlive_sigterm

from .stream import LogitStream


class BatchLoader(DataLoader):
    """A device's batches of a stream, cut after `batches` if given, and decoded in the processes that `args` set.

    Trainer derives the number of optimizer steps, and the micro-batches of the last one, from the length of its loader.
    So the loader of a resumed run has the length of the rest of the run. A finished run has the length 1: with less,
    Trainer would take the length as unknown and train again; with it, no epoch is left.
    """

    def __init__(self, stream: LogitStream, args: TrainingArguments, *, batches: int | None = None):
        workers = args.dataloader_num_workers
        super().__init__(
            stream,
            batch_size=None,
            worker_init_fn=outlive_sigterm,
            num_workers=workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            pin_memory=args.dataloader_pin_memory,
            # A separate generator: each pass draws a seed, which must not change the random numbers of dropout.
            generator=torch.Generator(),
        )
        self._batches = None if batches is None else max(1, batches)

    def __len__(self) -> int:
        """Batches of one pass. Raises `TypeError` if the loader has no bound."""
        if self._batches is None:
            raise TypeError("the length of this loader is not known")
        return self._batches

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        return islice(super().__iter__(), self._batches)


class OnePass:
    """The batches of one pass over a loader: each `iter` continues where the one before ended."""

    def __init__(self, loader: Iterable[Any]):
        self._loader = loader
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            self._batches = iter(self._loader)
        return self._batches
