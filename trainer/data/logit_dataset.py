"""`load_logit_dataset`: paths of sealed datasets come in, one `LogitDataset` to train from goes out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import TokenizerMismatch
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.store import Store
from coldstill.trainer.errors import InvalidMixture, MoreThanStored, NoTargets

from .shard_cache import ShardCache
from .sources import Sources
from .stream import LogitStream
from .thinning import with_smaller_top_k

CACHE_BYTES = 32 << 30
_SAMPLED_PLACES = 4
_SAMPLED_ROWS = 8
"""In each place; rows of one row group cost as much as one of them."""


def load_logit_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    top_k: int | None = None,
    draws: int | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> LogitDataset:
    """The sealed dataset at a local path or fsspec URL, or several of them mixed.

    `weights`: the share of the rows that comes from each, in proportion to their rows if left out. `top_k`, `draws`:
    how many kept ids and draws of a position are used, all if left out; a smaller `top_k` turns the ids that it cuts
    into draws of known weight, and `draws` is counted as the capture counted: so many from the full distribution, of
    which those in the tail were kept. `cache_dir`: where copies of remote shards lie, by default `shards` in
    `$COLDSTILL_CACHE` or `~/.cache/coldstill`; at most `cache_bytes` of them.

    Raises the errors of `open_dataset`, `NoTargets`, `TokenizerMismatch`, `InvalidMixture`, `MoreThanStored`.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise InvalidMixture("datasets", found="none", wanted="at least one path")
    datasets = [open_dataset(each) for each in paths]
    for dataset in datasets:
        _check(dataset, first=datasets[0], top_k=top_k, draws=draws)
    shares = [float(len(dataset)) for dataset in datasets] if weights is None else [float(share) for share in weights]
    if len(shares) != len(datasets) or not all(0 < share < float("inf") for share in shares):
        raise InvalidMixture("weights", found=shares, wanted=f"{len(datasets)} finite numbers above 0, one per dataset")
    default = Path(os.environ.get("COLDSTILL_CACHE") or Path.home() / ".cache" / "coldstill", "shards")
    cache = ShardCache(default if cache_dir is None else Path(cache_dir), most_bytes=cache_bytes)
    return LogitDataset(Sources(datasets=datasets, weights=shares, top_k=top_k, draws=draws, cache=cache))


class LogitDataset:
    """Cached rows to train from: facts about them, and streams of batches."""

    def __init__(self, sources: Sources):
        self.sources = sources

    @property
    def header(self) -> DatasetHeader:
        """The header of the first dataset, with `top_k` and draws as they are used."""
        header = self.sources.datasets[0].header
        top_k, draws = self.sources.top_k, self.sources.draws
        changes = {} if top_k is None else {"top_k": top_k}
        if draws is not None:
            changes |= {"draws": draws, "kept_draws": min(draws, header.kept_draws)}
        return header.model_copy(update=changes)

    @property
    def dataset_ids(self) -> tuple[str, ...]:
        """Ids of the datasets, in order."""
        return tuple(dataset.dataset_id for dataset in self.sources.datasets)

    @property
    def draws(self) -> int:
        """Most tail draws of a position; 0 where no position has any. The ids that a smaller `top_k` cuts are draws."""
        headers = [dataset.header for dataset in self.sources.datasets]
        stored = max(min(header.draws, header.kept_draws) for header in headers)
        draws = stored if self.sources.draws is None else min(stored, self.sources.draws)
        top_k = self.sources.top_k
        is_cut = top_k is not None and any(header.top_k > top_k for header in headers)
        return max(1, draws) if is_cut else draws

    @property
    def draw_logprobs(self) -> bool:
        """Whether the log-prob of every draw is known."""
        return all(dataset.header.draw_logprobs for dataset in self.sources.datasets)

    @property
    def is_dense(self) -> bool:
        """Whether every id of the vocabulary is kept at every position."""
        headers = [dataset.header for dataset in self.sources.datasets]
        whole = all(header.top_k == header.token_count and header.min_prob == 0 for header in headers)
        return whole and self.sources.top_k in (None, headers[0].token_count)

    @property
    def rows(self) -> int:
        """Rows of all datasets, which is an epoch."""
        return self.sources.rows

    @property
    def targets(self) -> int:
        """Target positions of all datasets."""
        return sum(dataset.manifest.targets for dataset in self.sources.datasets)

    def mean_tail_mass(self) -> float:
        """The teacher's mean mass outside the kept ids, from a few rows of each dataset. Raises as `Dataset.row`."""
        return self._mean_tail_mass

    def stream(
        self,
        *,
        batch_size: int,
        seed: int,
        pack_length: int | None = None,
        epochs: int | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> LogitStream:
        """Batches of `batch_size` rows, or of packs of `pack_length` tokens, for ever or for so many `epochs`."""
        return LogitStream(
            self.sources,
            batch_size=batch_size,
            seed=seed,
            pack_length=pack_length,
            epochs=epochs,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
        )

    @cached_property
    def _mean_tail_mass(self) -> float:
        weights = np.array(self.sources.weights)
        return float(weights @ [self._tail_mass(dataset) for dataset in self.sources.datasets] / weights.sum())

    def _tail_mass(self, dataset: Dataset) -> float:
        # Another reader than the streams': its open files must not travel to loader workers.
        reader = Dataset(Store(dataset.store.url))
        starts = np.linspace(0, len(reader), _SAMPLED_PLACES, endpoint=False).astype(int).tolist()
        numbers = sorted({n for start in starts for n in range(start, min(start + _SAMPLED_ROWS, len(reader)))})
        found = [reader.row(number).targets for number in numbers]
        if self.sources.top_k is not None and self.sources.top_k < reader.header.top_k:
            found = [with_smaller_top_k(targets, self.sources.top_k).targets for targets in found]
        return float(np.exp(np.concatenate([targets.log_tail for targets in found]), dtype=np.float64).mean())


def _check(dataset: Dataset, *, first: Dataset, top_k: int | None, draws: int | None) -> None:
    where, header = dataset.store.url, dataset.header
    if not dataset.manifest.targets:
        raise NoTargets(
            f"dataset {where}",
            found=f"{len(dataset)} rows without a target position",
            wanted="at least one",
            fix="capture again; see the dataset's rejects/ for why no row was usable",
        )
    if header.tokenizer_fingerprint != first.header.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"tokenizer of {where}",
            found=f"{header.token_count} ids, fingerprint {header.tokenizer_fingerprint[:12]}",
            wanted=f"that of {first.store.url}: {first.header.token_count} ids, "
            f"fingerprint {first.header.tokenizer_fingerprint[:12]}",
            fix="mix datasets of one tokenizer only",
        )
    for name, wanted, stored, least in (("top_k", top_k, header.top_k, 1), ("draws", draws, header.draws, 0)):
        if wanted is not None and not least <= wanted <= stored:
            raise MoreThanStored(f"{name} of {where}", found=wanted, wanted=f"{least} to {stored}, what is stored")
