"""Sources whose rows cannot be sought: compressed lines, datasets that `datasets` streams, Parquet in huge row groups.

What the settings name in; each row as a JSON text out, from the first on. `staging.py` copies them to be sought in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.config import SourceConfig
from coldstill.pipeline.errors import SourceNotFound, SourceUnreadable
from coldstill.storage_schema.plan import Unit

from .files import ByteMeter, files_below, lines_of
from .parquet_rows import ParquetRows
from .rows import SourceFile, SourceRow, Survey, changed, parsed, without_nulls

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Stream(ABC):
    """Rows in a fixed order. `files` tell of a change; `sha256` is the content's digest after all documents."""

    def __init__(self, files: Sequence[SourceFile]):
        self.files = tuple(files)
        self.sha256: str | None = None

    @abstractmethod
    def documents(self) -> Iterator[bytes]:
        """Each row as JSON. Raises `SourceUnreadable` where the source is damaged."""

    def rows(self) -> Iterator[SourceRow]:
        """All rows, from the first on."""
        return itertools.starmap(parsed, enumerate(self.documents()))

    def survey(self, rows: int) -> Survey:
        """The survey, after all `rows` documents were read."""
        assert self.sha256 is not None
        return Survey(self.sha256, rows, None, self.files)


class CompressedLines(Stream):
    """JSON lines, compressed or not: a pattern may find both."""

    def documents(self) -> Iterator[bytes]:
        with ByteMeter(self.files, "reading the source") as meter:
            for file in self.files:
                compression = COMPRESSIONS.get(Path(file.name).suffix)
                with meter.opened(file) as read:
                    for line in lines_of(read, name=file.name, compression=compression):
                        if line := line.strip():
                            yield line
        self.sha256 = meter.sha256


class WideParquet(Stream):
    """Parquet in row groups that are too large to be read for each unit."""

    def documents(self) -> Iterator[bytes]:
        rows = ParquetRows(self.files)
        survey = rows.survey(1)
        with tqdm(total=survey.rows, desc="reading the source", unit=" rows", delay=3) as bar:
            for row in rows.rows():
                yield _json(row.columns)
                bar.update()
        self.sha256 = survey.sha256


class HubDataset(Stream):
    """A dataset of the hub, or in a local folder, that the library `datasets` streams; its digest is that of the rows
    as JSON lines. A dataset of the hub is one file whose stamp is the commit that is read."""

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
                    document = _json({name: without_nulls(value) for name, value in row.items()})
                    digest.update(document + b"\n")
                    yield document
                    bar.update()
        except ColdstillError:
            raise
        except Exception as error:  # of the library, its builders, or the store behind it: they share no class
            raise self._named(error, number) from None
        self.sha256 = digest.hexdigest()

    def _load(self) -> Iterator[dict[str, Any]]:
        try:
            from datasets import load_dataset  # type: ignore[import-untyped]
        except ImportError:
            raise SourceUnreadable(
                f"source.dataset {self._name}",
                found="the library datasets is not installed",
                wanted="it, to read a dataset by its name",
                fix="pip install datasets",
            ) from None
        config = self._config
        yield from load_dataset(
            self._name, config.dataset_config, split=config.split, revision=self._commit, streaming=True
        )

    def _named(self, error: Exception, rows: int) -> SourceNotFound | SourceUnreadable:
        """Before the first row it is nearly always a wrong name, configuration or split."""
        if not rows:
            return SourceNotFound(
                f"source.dataset {self._name}",
                found=_first_line(error),
                wanted="a dataset that `datasets` loads",
                fix="check source.dataset, dataset_config, split and revision",
            )
        return SourceUnreadable(
            f"source.dataset {self._name}: after row {rows}",
            found=_first_line(error),
            wanted="rows to the end",
            fix="start again, where the network failed",
        )


class SequentialRows:
    """Units of a stream that is staged nowhere: read in their order they cost one pass, in any other a pass each."""

    def __init__(self, name: str, rows: Callable[[], Iterator[SourceRow]]):
        self._name, self._rows = name, rows
        self._following = rows()
        self._next = 0

    def read(self, unit: Unit) -> Iterator[SourceRow]:
        if unit.first_row < self._next:
            self._following, self._next = self._rows(), 0
        for row in self._following:
            self._next = row.number + 1
            if row.number >= unit.first_row:
                yield row
            if self._next == unit.first_row + unit.rows:
                return
        found, wanted = f"{self._next} rows in all", f"row {unit.first_row + unit.rows - 1}"
        raise changed(self._name, unit=unit, found=found, wanted=wanted)


def _commit(config: SourceConfig) -> str | None:
    """Commit of a hub dataset's revision; without an answer, what was given."""
    try:
        from huggingface_hub import HfApi

        commit: str | None = HfApi().dataset_info(str(config.dataset), revision=config.revision).sha
    except Exception:  # of the hub's client, its HTTP library or the network: all mean that there is no answer
        return config.revision
    return commit


def _json(columns: Any) -> bytes:
    # What JSON cannot say (dates, bytes) becomes text, as in metadata.
    return json.dumps(columns, default=str).encode()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
