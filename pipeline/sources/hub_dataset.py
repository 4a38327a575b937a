"""A dataset of the Hub, or of a local folder, that the library `datasets` streams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coldstill.common.errors import ColdstillError, first_line
from coldstill.common.progress import tqdm
from coldstill.pipeline.errors import SourceNotFound, SourceUnreadable
from coldstill.pipeline.source_config import SourceConfig

from .files import SourceFile, Stream, digested_text, files_below, json_text, without_nulls


class HubDataset(Stream):
    """All rows of one split. The digest is that of the rows as JSON Lines.

    `files` of a Hub dataset is one entry whose stamp is the commit; of a local folder, the files in it.
    """

    def __init__(self, config: SourceConfig):
        assert config.dataset is not None
        self._config, self._name = config, config.dataset
        if Path(self._name).is_dir():
            self._commit = config.revision
            super().__init__(files_below(self._name))
        else:
            self._commit = _commit(config)
            super().__init__([SourceFile(name=f"hf://datasets/{self._name}", bytes=None, stamp=self._commit or "")])

    def documents(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        number = 0
        try:
            with tqdm(desc="reading the source", unit=" rows", delay=3) as bar:
                for number, row in enumerate(self._load(), start=1):  # noqa: B007
                    columns = {name: without_nulls(value) for name, value in row.items()}
                    document = json_text(columns)
                    digest.update(digested_text(columns, document) + b"\n")
                    yield document
                    bar.update()
        except ColdstillError:
            raise
        except Exception as error:  # raised by the library, its builders or a store: they share no base class
            raise self._named(error, number) from None
        self.sha256 = digest.hexdigest()

    def _load(self) -> Iterator[dict[str, Any]]:
        try:
            from datasets import load_dataset, load_from_disk  # type: ignore[import-untyped]
        except ImportError:
            raise SourceUnreadable(
                f"source.dataset {self._name}",
                found="the library datasets is not installed",
                wanted="that library, to read source.dataset",
                fix="pip install datasets",
            ) from None
        config = self._config
        saved = [(Path(self._name) / name).is_file() for name in ("state.json", "dataset_dict.json")]
        if any(saved):  # of `save_to_disk`, which load_dataset refuses
            loaded = load_from_disk(self._name)
            rows = (loaded if saved[0] else loaded[config.split]).to_iterable_dataset()
        else:
            rows = load_dataset(
                self._name, config.dataset_config, split=config.split, revision=self._commit, streaming=True
            )
        # An image stays the bytes that the dataset has: {bytes, path}.
        yield from rows.decode(False) if "Image(" in str(rows.features) else rows

    def _named(self, error: Exception, rows: int) -> SourceNotFound | SourceUnreadable:
        """An error before the first row nearly always means a wrong name, configuration or split."""
        if not rows:
            return SourceNotFound(
                f"source.dataset {self._name}",
                found=first_line(error),
                wanted="a dataset that `datasets` loads",
                fix="check source.dataset, dataset_config, split and revision",
            )
        return SourceUnreadable(
            f"source.dataset {self._name}: after row {rows}",
            found=first_line(error),
            wanted="rows to the end",
            fix="if the network failed, re-run the same command to resume",
        )


def _commit(config: SourceConfig) -> str | None:
    """Commit of the dataset's revision; the revision itself if the Hub does not respond."""
    try:
        from huggingface_hub import HfApi

        commit: str | None = HfApi().dataset_info(str(config.dataset), revision=config.revision).sha
    except Exception:  # of the Hub's client, its HTTP library or the network: each means that there is no response
        return config.revision
    return commit
