"""Imports write only the listed reject reasons, and the reasons of a dataset are counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import FileDamaged
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.verified_files import file_record
from coldstill.tools.exchange.importing import ImportedRow, import_rows, imported_header
from coldstill.tools.exchange.settings import ImportSettings
from coldstill.tools.reject_reasons import IMPORT_REASONS, MAX_REASONS, OTHER_REASONS, count_reasons
from tests import making


def test_the_reason_of_an_import_is_the_name_of_its_error() -> None:
    """Datasets of earlier releases hold these reasons."""
    assert {error.__name__: reason for error, reason in IMPORT_REASONS.items()} == {
        "UnusableRow": "UnusableRow",
        "InvalidRow": "InvalidRow",
        "InvalidTargets": "InvalidTargets",
    }


class OneGoodRow:
    """A source of one good row, and one bad row per error."""

    def __init__(self, errors: list[type[ColdstillError]]):
        self._rows = [
            ImportedRow("good", making.random_row(np.random.default_rng(0), "good", draws=0)),
            *(ImportedRow(error.__name__, error("row", found="x", wanted="y")) for error in errors),
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def items(self, start: int) -> Iterator[ImportedRow]:
        return iter(self._rows[start:])


def test_an_import_rejects_rows_for_the_listed_reasons_and_no_others(tmp_path: Path, tokenizer_folder: Path) -> None:
    settings = ImportSettings(tokenizer=tokenizer_folder, teacher="tiny", max_length=1000, rows_per_unit=8)
    header = imported_header(settings, top_k=8, source_sha256="0" * 64)
    options = {"header": header, "tokenizer": tokenizer_folder, "bad_rows": "reject", "progress": False}
    import_rows(OneGoodRow(list(IMPORT_REASONS)), tmp_path / "listed", **options)  # type: ignore[arg-type]
    assert count_reasons(open_dataset(tmp_path / "listed")) == dict.fromkeys(IMPORT_REASONS.values(), 1)
    with pytest.raises(FileDamaged):
        import_rows(OneGoodRow([FileDamaged]), tmp_path / "other", **options)  # type: ignore[arg-type]


def with_rejects(root: Path, lines: bytes) -> None:
    """The dataset with a file of rejects, all digests right."""
    name = "rejects/000000-aaaaaaaaaaaa.jsonl"
    (root / "rejects").mkdir()
    (root / name).write_bytes(lines)
    document = json.loads((root / MANIFEST_NAME).read_text())
    document["files"].append(file_record(name, lines).model_dump())
    (root / MANIFEST_NAME).write_text(json.dumps(document))


def test_many_reasons_are_counted_together(tiny_dataset: Path) -> None:
    lines = [json.dumps({"reason": f"r{n}"}) for n in range(3 * MAX_REASONS)]
    with_rejects(tiny_dataset, "\n".join(lines).encode())

    reasons = count_reasons(open_dataset(tiny_dataset))

    assert len(reasons) == MAX_REASONS + 1
    assert reasons[OTHER_REASONS] == 2 * MAX_REASONS
    assert reasons.total() == 3 * MAX_REASONS


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"7", b"\xff", b"{}", b'{"reason": 3}', b"[" * 100_000, b'{"reason": "a"}\n\n']
)
def test_rejects_that_are_none_are_a_named_error(tiny_dataset: Path, line: bytes) -> None:
    with_rejects(tiny_dataset, line)

    with pytest.raises(FileDamaged, match=r"rejects/000000-aaaaaaaaaaaa\.jsonl, line"):
        count_reasons(open_dataset(tiny_dataset))


def test_a_reject_of_tiny_values_is_not_parsed(tiny_dataset: Path) -> None:
    """30 MB of them took 800 MB, and a file may have 256."""
    with_rejects(tiny_dataset, b'{"reason": [' + b"[]," * 10_000_000 + b"0]}")

    with pytest.raises(FileDamaged, match="lists and objects"):
        count_reasons(open_dataset(tiny_dataset))
