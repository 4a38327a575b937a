"""`load_logit_dataset`: opens sealed datasets, checks that they fit together, and returns one `LogitDataset`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.rows import MEDIA_FOLDER
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.tokenizer import require_same_ids
from coldstill.trainer.errors import InvalidMixture, MoreThanStored, NoTargets, UnsupportedArgument

from .ensemble import check_ensemble
from .images import StudentImages
from .media import MediaCache
from .row_reader import Sources
from .shard_cache import ShardCache
from .stream import Collator, LogitStream
from .subsample import with_smaller_top_k

CACHE_BYTES = 32 << 30
_MEDIA_SHARE = 4
"""Of `cache_bytes`, the part that copies of media may take, for a remote dataset that has files of media."""
Rows = Literal["all", "without_images"]
_SAMPLED_PLACES = 4
_SAMPLED_ROWS = 8
"""Rows read in each place: several rows of one row group cost as much as one."""


def load_logit_dataset(
    path: str | Path | Sequence[str | Path] | None = None,
    *,
    weights: Sequence[float] | None = None,
    ensemble: Sequence[str | Path] | None = None,
    ensemble_weights: Sequence[float] | None = None,
    top_k: int | None = None,
    draws: int | None = None,
    rows: Rows = "all",
    cache_dir: str | Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> LogitDataset:
    """Open the sealed dataset at a local path or fsspec URL, or several to mix.

    - `weights`: the share of the rows from each dataset; by default in proportion to their rows.
    - `ensemble`: instead of `path`, several datasets with the same rows, one from each teacher. The loss of a position
      is the sum of each teacher's, with `ensemble_weights` divided by their sum; by default all are equal.
    - `top_k`, `draws`: kept ids and tail draws used per position; by default all. A smaller `top_k` turns the ids it
      cuts into draws of known weight. `draws` counts as the capture does: draws from the full distribution, of which
      those in the tail were kept.
    - `rows`: `without_images` passes over rows that have images. All shards are read once to count the others.
    - `cache_dir`: folder for copies of remote shards and media, at most `cache_bytes` together; by default `shards` in
      `$COLDSTILL_CACHE` or `~/.cache/coldstill`.

    Raises the errors of `open_dataset`, `NoTargets`, `TokenizerMismatch`, `InvalidMixture`, `MoreThanStored`,
    `EnsembleMismatch`.
    """
    if (path is None) == (ensemble is None):
        raise InvalidMixture("datasets", found="none" if path is None else "path and ensemble", wanted="one of both")
    paths = [path] if isinstance(path, (str, Path)) else list(path or ensemble or ())
    if len(paths) < (1 if ensemble is None else 2):
        raise InvalidMixture("datasets", found=len(paths), wanted="at least one path, and two for an ensemble")
    opened = [open_dataset(each) for each in paths]
    for dataset in opened:
        _check(dataset, first=opened[0], top_k=top_k, draws=draws)
    count, parts = len(opened), list[float]()
    if ensemble is not None:
        count, parts = 1, _shares("ensemble_weights", ensemble_weights, [1.0] * len(opened))
        check_ensemble(opened)
    datasets, partners = opened[:count], opened[count:]
    default = Path(os.environ.get("COLDSTILL_CACHE") or Path.home() / ".cache" / "coldstill", "shards")
    folder = default if cache_dir is None else Path(cache_dir)
    copies_media = any(not each.store.is_local and _media_files(each) for each in opened)
    media_bytes = cache_bytes // _MEDIA_SHARE if copies_media else 0
    sources = Sources(
        datasets=datasets,
        weights=[float(len(dataset)) for dataset in datasets],
        top_k=top_k,
        draws=draws,
        cache=ShardCache(folder, most_bytes=cache_bytes - media_bytes),
        media_cache=MediaCache(folder, most_bytes=media_bytes),
        without_images=rows == "without_images",
        counts=[len(dataset) for dataset in datasets],
        partners=partners,
        shares=[part / sum(parts) for part in parts],
    )
    counts = _counted(sources)
    return LogitDataset(replace(sources, weights=_shares("weights", weights, list(map(float, counts))), counts=counts))


def _shares(name: str, given: Sequence[float] | None, default: list[float]) -> list[float]:
    """The weight of each dataset. Raises `InvalidMixture`."""
    shares = default if given is None else [float(share) for share in given]
    if len(shares) != len(default) or not all(0 < share < float("inf") for share in shares):
        raise InvalidMixture(name, found=shares, wanted=f"{len(default)} finite numbers above 0, one per dataset")
    return shares


class LogitDataset:
    """The rows of one or several sealed datasets: facts about them, and streams of batches."""

    def __init__(self, sources: Sources):
        self.sources = sources

    @property
    def header(self) -> DatasetHeader:
        """The header of the first dataset, with the `top_k` and draws that are used."""
        header = self.sources.datasets[0].header
        top_k, draws = self.sources.top_k, self.sources.draws
        changes = {} if top_k is None else {"top_k": top_k}
        if draws is not None:
            changes |= {"draws": draws, "kept_draws": min(draws, header.kept_draws)}
        return header.model_copy(update=changes)

    @property
    def dataset_ids(self) -> tuple[str, ...]:
        """Ids of the datasets, in order."""
        return tuple(dataset.dataset_id for dataset in self.all_datasets)

    @property
    def all_datasets(self) -> tuple[Dataset, ...]:
        """The datasets that are mixed, or those of an ensemble."""
        return (*self.sources.datasets, *self.sources.partners)

    @property
    def ensemble_weights(self) -> tuple[float, ...]:
        """Weight of each teacher of an ensemble, with the sum 1; empty without one."""
        return tuple(self.sources.shares)

    def shares(self) -> dict[str, Sequence[float]]:
        """For cards: the share of each of several datasets in an epoch's rows, or in the loss of every row."""
        if self.ensemble_weights:
            return {"share of each teacher in the loss of every row": self.ensemble_weights}
        weights = self.sources.weights
        if len(weights) == 1:
            return {}
        return {"share of the rows from each dataset": [weight / sum(weights) for weight in weights]}

    @property
    def by_teacher(self) -> tuple[LogitDataset, ...]:
        """The dataset of each teacher of an ensemble; this one alone without one."""
        if not self.sources.partners:
            return (self,)
        parts = [replace(self.sources, datasets=[one], partners=(), shares=()) for one in self.all_datasets]
        return tuple(map(LogitDataset, parts))

    @property
    def draws(self) -> int:
        """Most tail draws of a position; 0 if no position has any. Ids cut by a smaller `top_k` count as draws."""
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
    def not_by_student(self) -> tuple[str, ...]:
        """Places of the datasets whose answers no student wrote under the row's prompt, by their headers."""
        return tuple(each.store.url for each in self.all_datasets if not each.header.about.is_by_student)

    @property
    def is_dense(self) -> bool:
        """Whether every id of the vocabulary is kept at every position."""
        headers = [dataset.header for dataset in self.sources.datasets]
        # With named ids, `top_k` only bounds how many a position keeps.
        whole = all(
            header.top_k == header.token_count and header.min_prob == 0 and header.kept_ids == "top_k"
            for header in headers
        )
        return whole and self.sources.top_k in (None, headers[0].token_count)

    @property
    def rows(self) -> int:
        """Rows of all datasets that are used: the length of an epoch."""
        return self.sources.rows

    @property
    def shows_images(self) -> bool:
        """Whether a header or a manifest says that used rows may have images. Only the rows tell for sure."""
        known = (each.header.about.processor is not None or _media_files(each) for each in self.sources.datasets)
        return not self.sources.without_images and any(known)

    def has_images(self) -> bool:
        """Whether `shows_images` and a row has an image: a teacher that sees images may have been shown text alone.

        Reads shards up to the first such row, so all of a dataset of text. Raises what `RowReader.rows` raises.
        """
        if not self.shows_images:
            return False
        reader, datasets = self.sources.reader(), self.sources.datasets
        try:
            return any(map(_media_files, datasets)) or any(
                reader.images(number, shard, group).any()
                for number, dataset in enumerate(datasets)
                for shard, record in enumerate(dataset.shards)
                if record.rows
                for group in range(reader.groups(number, shard))
            )
        finally:
            reader.close()

    def rows_above(self, tokens: int) -> list[tuple[str, int, int]]:
        """Datasets with rows of more than `tokens`, which have no images: place, longest row, number of such rows.

        All lengths are read, unless the header excludes longer rows. Raises what `RowReader.lengths` raises.
        """
        reader, found = self.sources.reader(), []
        try:
            for number, dataset in enumerate(self.sources.datasets):
                if dataset.header.max_length <= tokens:
                    continue
                longest = count = 0
                for shard, record in enumerate(dataset.shards):
                    for group in range(reader.groups(number, shard) if record.rows else 0):
                        lengths = reader.lengths(number, shard, group)[reader.images(number, shard, group) == 0]
                        count += int((lengths > tokens).sum())
                        longest = max(longest, int(lengths.max(initial=0)))
                if count:
                    found.append((dataset.store.url, longest, count))
        finally:
            reader.close()
        return found

    @property
    def targets(self) -> int:
        """Target positions of all datasets."""
        return sum(dataset.manifest.targets for dataset in self.sources.datasets)

    def facts(self) -> dict[str, Any]:
        """What `build_objective` needs to know of the targets. Raises `Dataset.row`'s errors."""
        return {
            "draws": self.draws,
            "mean_tail_mass": self.mean_tail_mass(),
            "dense": self.is_dense,
            "draw_logprobs": self.draw_logprobs,
            "not_by_student": self.not_by_student,
        }

    def mean_tail_mass(self) -> float:
        """The teacher's mean mass outside the kept ids, from a few rows of each dataset. Raises `Dataset.row`'s
        errors."""
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
        images: StudentImages | None = None,
        collator: Collator | None = None,
    ) -> LogitStream:
        """Batches of `batch_size` rows, or of packs of `pack_length` tokens; endless unless `epochs` is given.

        `shuffle`: if False, rows come in stored order, one dataset after the other, whatever the weights of a mixture.
        `images`: how the student reads images; without it, rows with images are an error. `collator`: makes batches of
        single rows in another way, such as in the tokens of another tokenizer.
        """
        return LogitStream(
            self.sources,
            batch_size=batch_size,
            seed=seed,
            pack_length=pack_length,
            epochs=epochs,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            images=images,
            collator=collator,
        )

    @cached_property
    def _mean_tail_mass(self) -> float:
        weights = np.array(self.sources.weights)
        return float(weights @ [self._tail_mass(dataset) for dataset in self.sources.datasets] / weights.sum())

    def _tail_mass(self, dataset: Dataset) -> float:
        # A separate reader: open files must not be sent to loader workers with the streams.
        reader = Dataset(Store(dataset.store.url))
        starts = np.linspace(0, len(reader), _SAMPLED_PLACES, endpoint=False).astype(int).tolist()
        numbers = sorted({n for start in starts for n in range(start, min(start + _SAMPLED_ROWS, len(reader)))})
        found = [reader.row(number).targets for number in numbers]
        if self.sources.top_k is not None and self.sources.top_k < reader.header.top_k:
            found = [with_smaller_top_k(targets, self.sources.top_k).targets for targets in found]
        return float(np.exp(np.concatenate([targets.log_tail for targets in found]), dtype=np.float64).mean())


def check_eval_dataset(dataset: Any, trained: LogitDataset, *, name: str = "eval_dataset") -> None:
    """Raise `TokenizerMismatch` unless `dataset`, or each dataset of a mapping, has the ids of the `trained` one.

    Raises `UnsupportedArgument` for anything but datasets of `load_logit_dataset`, and for an ensemble.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_eval_dataset(part, trained, name=f"{name}[{key!r}]")
        return
    require_logit_dataset(dataset, name=name)
    if dataset.ensemble_weights:
        raise UnsupportedArgument(
            name,
            found=f"an ensemble of {len(dataset.ensemble_weights)} teachers",
            wanted="a dataset of one teacher: a figure compares the student with one distribution",
            fix="pass one of dataset.by_teacher, or all of them as {NAME: part}",
        )
    require_same_ids(
        f"tokenizer of {name} ({dataset.sources.datasets[0].store.url})",
        dataset.header.ids,
        trained.header.ids,
        of=f"the dataset of the training, {trained.sources.datasets[0].store.url}",
        fix="capture held-out rows with a teacher that has the tokenizer of the training's dataset",
    )


def require_logit_dataset(dataset: Any, *, name: str) -> None:
    """Raise `UnsupportedArgument` for a dataset that `load_logit_dataset` did not return."""
    if not (hasattr(dataset, "header") and hasattr(dataset, "sources")):
        raise UnsupportedArgument(
            name,
            found=f"a {type(dataset).__name__}",
            wanted="a dataset with the teacher's log-probs",
            fix="pass load_logit_dataset(PATH) of a dataset that `coldstill capture` wrote",
        )


def _media_files(dataset: Dataset) -> bool:
    return any(file.name.startswith(f"{MEDIA_FOLDER}/") for file in dataset.manifest.files)


def _counted(sources: Sources) -> list[int]:
    """Rows of each dataset that are used. Raises `NoTargets` if a dataset has none."""
    if not sources.without_images:
        return [len(dataset) for dataset in sources.datasets]
    reader, counts = sources.reader(), []
    try:
        for number, dataset in enumerate(sources.datasets):
            count = 0
            for shard, record in enumerate(dataset.shards):
                if record.rows:
                    groups = range(reader.groups(number, shard))
                    count += sum(reader.numbers(number, shard, group).size for group in groups)
            if not count:
                raise NoTargets(
                    f"dataset {dataset.store.url}",
                    found=f"{len(dataset)} rows, all with images",
                    wanted="a row without images, because data.rows is without_images",
                    fix="leave this dataset out, or train a student that sees images with data.rows: all",
                )
            counts.append(count)
    finally:
        reader.close()
    return counts


def _check(dataset: Dataset, *, first: Dataset, top_k: int | None, draws: int | None) -> None:
    where, header = dataset.store.url, dataset.header
    if not dataset.manifest.targets:
        raise NoTargets(
            f"dataset {where}",
            found=f"{len(dataset)} rows without a target position",
            wanted="at least one",
            fix="capture again; the dataset's rejects/ folder lists why each row was rejected",
        )
    fix = "mix only datasets with the same tokenizer"
    require_same_ids(f"tokenizer of {where}", header.ids, first.header.ids, of=first.store.url, fix=fix)
    for name, wanted, stored, least in (("top_k", top_k, header.top_k, 1), ("draws", draws, header.draws, 0)):
        if wanted is not None and not least <= wanted <= stored:
            raise MoreThanStored(f"{name} of {where}", found=wanted, wanted=f"{least} to {stored}, the number stored")
