"""Laws of the header: what a reader refuses, what it keeps, and how the two formats agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import FileDamaged, HeaderMismatch, InvalidHeader, UnsupportedFormat
from coldstill.storage_schema.faithfulness import FAITHFULNESS_NAME
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import About
from coldstill.storage_schema.manifest import read_manifest, seal
from coldstill.storage_schema.store import Store
from coldstill.tools.derive.subset import subset
from coldstill.tools.pull import pull
from coldstill.tools.verify import verify
from tests import making
from tests.storage_schema.make_golden import ALL_FIELDS

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def header(tokenizer_folder: Path) -> DatasetHeader:
    """A header of the newest format."""
    return making.tiny_header(tokenizer_folder)


def _read(document: dict[str, Any]) -> DatasetHeader:
    return DatasetHeader.from_bytes(json.dumps(document).encode(), where="x")


def _document(header: DatasetHeader) -> dict[str, Any]:
    document = json.loads(header.to_bytes())
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("format_v*/*/dataset.json")), ids=lambda path: path.parent.name)
def test_a_header_that_is_read_and_written_keeps_its_fields(path: Path) -> None:
    data = path.read_bytes()
    written = DatasetHeader.from_bytes(data, where="x").to_bytes()
    assert json.loads(written) == json.loads(data)
    assert DatasetHeader.from_bytes(written, where="x").to_bytes() == written


def test_a_header_of_format_1_is_written_as_the_last_release_of_it_did() -> None:
    """An unfinished dataset of that release goes on in its format, and equal captures have equal ids."""
    data = (GOLDEN / "header_v1.json").read_bytes()
    assert DatasetHeader.from_bytes(data, where="x").to_bytes() == data


def test_a_new_header_has_format_2(header: DatasetHeader) -> None:
    document = _document(header)
    assert document["format_version"] == 2
    assert document["about"] == {"license": "CC0-1.0"}
    assert "licence" not in document


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.0),
        ("draw_method", "antithetic"),
        ("draw_weights", "stored"),
        ("kept_ids", "sampled"),
        ("tail", "estimated"),
    ],
)
def test_what_a_reader_must_know_and_does_not_is_refused_by_name(
    header: DatasetHeader, field: str, value: object
) -> None:
    with pytest.raises(UnsupportedFormat, match=rf"x: {field}\n(.|\n)*newer coldstill"):
        _read({**_document(header), field: value})


def test_what_a_reader_may_ignore_is_kept(tmp_path: Path, tokenizer_folder: Path) -> None:
    about = {"license": "MIT", "weather": {"sky": ["blue", None]}}
    header = making.tiny_header(tokenizer_folder, about=about)
    rows = making.random_rows(8)
    making.write_dataset(tmp_path / "a", [rows[:4], rows[4:]], header=header, tokenizer=tokenizer_folder)

    derived = subset(tmp_path / "a", tmp_path / "b", rows="1:6", progress=False)
    pull(tmp_path / "b", tmp_path / "c", progress=False)

    for root in ("a", "b", "c"):
        assert _document(open_dataset(tmp_path / root).header)["about"] == about
        assert verify(tmp_path / root, deep=True, progress=False) == []
    assert len(derived) == 5


def test_a_field_that_is_left_out_has_its_default(header: DatasetHeader) -> None:
    later = ("draw_method", "draw_from", "draw_number", "draw_weights", "kept_ids", "teacher_prompt")
    document = {name: value for name, value in _document(header).items() if name not in later}
    assert _read(document) == header


@pytest.mark.parametrize("field", ["license", "about", "draw_method", "surprise", "teacher.engine_args"])
def test_format_1_has_no_field_of_format_2(field: str) -> None:
    document = json.loads((GOLDEN / "format_v1/coarse_wide/dataset.json").read_text())
    part = document["teacher"] if field.startswith("teacher.") else document
    part[field.rpartition(".")[2]] = {}
    with pytest.raises(InvalidHeader, match=f"x: {field}"):
        _read(document)


def test_a_shard_s_copy_in_format_1_stands_for_the_same_facts_only() -> None:
    old = DatasetHeader.from_bytes((GOLDEN / "format_v1/coarse_wide/dataset.json").read_bytes(), where="x")
    new = old.newest()
    assert new.stands_for(old)
    assert not old.stands_for(new)
    more = new.model_copy(update={"about": About(license=old.about.license, template_date="2026-11-28")})
    assert more.stands_for(old)
    for change in (
        {"top_k": 299},
        {"draw_method": "systematic"},
        {"kept_ids": "top_k_and_named"},
        {"about": About(license="MIT")},
        {"teacher": old.teacher.model_copy(update={"name": "other"})},
    ):
        assert not new.model_copy(update=change).stands_for(old), change


def test_a_copy_of_format_2_must_be_equal(header: DatasetHeader) -> None:
    other = header.model_copy(update={"about": About(license="CC0-1.0", end_token_ids=(1,))})
    assert header.stands_for(header)
    assert not header.stands_for(other)


@pytest.mark.parametrize("field", [name for name in ALL_FIELDS if name != "about"])
def test_headers_that_differ_in_a_field_are_not_equal(header: DatasetHeader, field: str) -> None:
    changed = DatasetHeader.model_validate({**header.model_dump(), field: ALL_FIELDS[field]})
    with pytest.raises(HeaderMismatch, match=f"there: {field}"):
        header.require_equal(changed, where="there", fix="")


def test_facts_that_one_header_does_not_state_are_not_compared(header: DatasetHeader) -> None:
    first = header.model_copy(update={"about": About(license="MIT", end_token_ids=(1, 2))})
    header.model_copy(update={"about": About(license="MIT")}).require_equal(first, where="", fix="")
    other = header.model_copy(update={"about": About(license="MIT", end_token_ids=(1, 3))})
    with pytest.raises(HeaderMismatch, match=r"there: about\.end_token_ids"):
        first.require_equal(other, where="there", fix="")
    with pytest.raises(HeaderMismatch, match=r"there: about\.license"):
        first.require_equal(header.model_copy(update={"about": About()}), where="there", fix="")


def test_the_id_does_not_depend_on_the_faithfulness_sample(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Shards of two machines can be equal while the values before rounding differ in their last bits."""
    header, rows = making.tiny_header(tokenizer_folder), making.random_rows(6)
    nudged = [replace(row, targets=replace(row.targets, logprobs=row.targets.logprobs - 1e-7)) for row in rows]
    ids = []
    for name, written in (("a", rows), ("b", nudged)):
        store = making.begin_dataset(tmp_path / name, header, tokenizer_folder, [6])
        commit_unit(store, 0, rows=written, rejects=[], header=header, environment={}, faithful_positions=9)
        seal(store)
        ids.append(open_dataset(tmp_path / name).dataset_id)
    samples = [(tmp_path / name / FAITHFULNESS_NAME).read_bytes() for name in "ab"]
    assert samples[0] != samples[1]
    assert ids[0] == ids[1]


def test_a_damaged_faithfulness_sample_is_found(tmp_path: Path) -> None:
    store = Store(GOLDEN / "format_v2" / "coarse_wide")
    assert FAITHFULNESS_NAME not in [file.name for file in read_manifest(store)[0].files]
    pull(store.url, tmp_path / "copy", progress=False)
    path = tmp_path / "copy" / FAITHFULNESS_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)

    findings = verify(tmp_path / "copy", progress=False)

    assert [(finding.where, finding.error) for finding in findings] == [(FAITHFULNESS_NAME, "FileDamaged")]
    with pytest.raises(FileDamaged, match=FAITHFULNESS_NAME):
        pull(tmp_path / "copy", tmp_path / "again", progress=False)
