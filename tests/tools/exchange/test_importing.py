"""What every import shares: interrupted, repeated, with changed settings, or with a source that ends early."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coldstill.storage_schema.commits import committed_units
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import HeaderMismatch, InvalidTargets, TokenizerNotFound
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.store import Store
from coldstill.tools.errors import SourceUnreadable, UnusableRow
from coldstill.tools.exchange.importing import ImportedRow, import_rows, imported_header
from coldstill.tools.exchange.settings import ImportSettings
from tests import making


class Rows:
    """Ten rows in memory; `killed_at`: the process dies when it is asked for this one."""

    def __init__(self, *, killed_at: int | None = None, count: int = 10, faulty: bool = False):
        rng = np.random.default_rng(3)
        self.rows = [making.random_row(rng, f"row-{i}", draws=0) for i in range(10)]
        if faulty:
            self.rows[4].targets.logprobs[:] = 0
        self.killed_at, self.count, self.asked = killed_at, count, list[int]()

    def __len__(self) -> int:
        return self.count

    def items(self, start: int) -> Iterator[ImportedRow]:
        """Rows from `start` on."""
        for number in range(start, 10):
            if number == self.killed_at:
                os._exit(9)
            self.asked.append(number)
            yield ImportedRow(self.rows[number].sample_id, self.rows[number])


def header_of(tokenizer: Path, **changes: object) -> DatasetHeader:
    """A header of an import of `Rows`."""
    fields = {"teacher": "t", "max_length": 64, "rows_per_unit": 3, "source_sha256": "0" * 64, **changes}
    source_sha256 = str(fields.pop("source_sha256"))
    settings = ImportSettings.model_validate({"tokenizer": tokenizer, **fields})
    return imported_header(settings, top_k=8, source_sha256=source_sha256)


def _killed_import(output: Path, tokenizer: Path) -> None:
    import_rows(Rows(killed_at=7), output, header=header_of(tokenizer), tokenizer=tokenizer, progress=False)


def test_an_interrupted_import_equals_an_unbroken_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_import, args=(tmp_path / "a", tokenizer_folder)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert committed_units(Store(tmp_path / "a")) == {0, 1}
    rows = Rows()
    header = header_of(tokenizer_folder)
    import_rows(rows, tmp_path / "a", header=header, tokenizer=tokenizer_folder, progress=False)
    assert rows.asked == [6, 7, 8, 9]
    import_rows(Rows(), tmp_path / "b", header=header, tokenizer=tokenizer_folder, progress=False)
    assert open_dataset(tmp_path / "a").dataset_id == open_dataset(tmp_path / "b").dataset_id
    again = Rows()
    import_rows(again, tmp_path / "a", header=header, tokenizer=tokenizer_folder, progress=False)
    assert again.asked == []


def test_a_gap_in_the_middle_is_filled_and_nothing_else(tmp_path: Path, tokenizer_folder: Path) -> None:
    header = header_of(tokenizer_folder)
    import_rows(Rows(), tmp_path / "a", header=header, tokenizer=tokenizer_folder, progress=False)
    unbroken = open_dataset(tmp_path / "a").dataset_id
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "commits" / "000001.json").unlink()
    rows = Rows()
    import_rows(rows, tmp_path / "a", header=header, tokenizer=tokenizer_folder, progress=False)
    assert rows.asked == [3, 4, 5]
    assert open_dataset(tmp_path / "a").dataset_id == unbroken


@pytest.mark.parametrize(
    ("field", "value"), [("license", "MIT"), ("rows_per_unit", 4), ("source_sha256", "1" * 64), ("fidelity", "coarse")]
)
def test_a_changed_setting_on_an_existing_output_is_named(
    field: str, value: object, tmp_path: Path, tokenizer_folder: Path
) -> None:
    header = header_of(tokenizer_folder)
    import_rows(Rows(), tmp_path / "a", header=header, tokenizer=tokenizer_folder, progress=False)
    changed = header_of(tokenizer_folder, **{field: value})
    named = {"fidelity": "codec", "license": r"about\.license"}.get(field, field)
    with pytest.raises(HeaderMismatch, match=named):
        import_rows(Rows(), tmp_path / "a", header=changed, tokenizer=tokenizer_folder, progress=False)


def test_a_source_that_ends_early_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(SourceUnreadable, match="its end at row 10"):
        import_rows(
            Rows(count=12),
            tmp_path / "a",
            header=header_of(tokenizer_folder),
            tokenizer=tokenizer_folder,
            progress=False,
        )


def test_a_row_that_breaks_a_law_or_is_too_long_ends_the_import_or_is_rejected(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    for name, rows, header, error in (
        ("law", Rows(faulty=True), header_of(tokenizer_folder), InvalidTargets),
        ("length", Rows(), header_of(tokenizer_folder, max_length=14), UnusableRow),
    ):
        with pytest.raises(error):
            import_rows(rows, tmp_path / name, header=header, tokenizer=tokenizer_folder, progress=False)
        manifest = import_rows(
            rows, tmp_path / name, header=header, tokenizer=tokenizer_folder, bad_rows="reject", progress=False
        )
        assert manifest.rejected > 0
        assert manifest.rows + manifest.rejected == 10


def test_the_tokenizer_is_copied_and_must_be_there(tmp_path: Path, tokenizer_folder: Path) -> None:
    header = header_of(tokenizer_folder)
    import_rows(Rows(), tmp_path / "a", header=header, tokenizer=tokenizer_folder, progress=False)
    names = {file.name for file in open_dataset(tmp_path / "a").manifest.files}
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} <= names
    with pytest.raises(TokenizerNotFound):
        header_of(tmp_path)
