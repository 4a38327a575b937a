"""Data that is too large is refused before it is read or parsed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.driver.status import read_status
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import CommitDamaged, TokenizerNotFound
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.plan import PLAN_NAME
from coldstill.storage_schema.store import Store
from coldstill.storage_schema.verified_files import file_record
from coldstill.tools.errors import TokenizerUnreadable
from coldstill.tools.inspect.token_text import TokenText
from tests.fuzz import shard_rows
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import (
    Read,
    change_document,
    change_parts,
    change_row,
    first_shard,
    written,
)


def test_a_header_of_100_megabytes_is_not_parsed(tree: Tree, read: Read) -> None:
    tree.files[HEADER_NAME] = tree.files[HEADER_NAME].replace(b'"tiny"', b'"' + b"a" * 100_000_000 + b'"')
    tree.reseal()
    assert read(tree)["named"]["open"] in ("InvalidHeader", "FileDamaged")


def test_a_header_in_a_footer_that_is_too_large_is_not_parsed(tree: Tree, read: Read) -> None:
    header = tree.files[HEADER_NAME]
    change_parts(tree, lambda parts: parts.set_header(header + b" " * (1 << 20)))
    assert read(tree)["named"]["rows"] == "InvalidHeader"


def test_a_footer_that_is_too_large_is_not_read(tree: Tree, read: Read) -> None:
    change_parts(tree, lambda parts: parts.set_header(b" " * (64 << 20)))
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_a_manifest_of_8_gigabytes_is_not_read(tree: Tree, read: Read, tmp_path: Path) -> None:
    root = written(tree, tmp_path / "dataset")
    del tree.files[MANIFEST_NAME]
    os.truncate(root / MANIFEST_NAME, 8 << 30)  # a file of holes: takes no room
    assert isinstance(read(tree)["named"]["open"], str)


@pytest.mark.parametrize("name", ["commits/000000.json", PLAN_NAME, HEADER_NAME])
def test_a_file_of_a_terabyte_that_takes_no_room_is_not_read(tree: Tree, tmp_path: Path, name: str) -> None:
    """Of an unfinished dataset, whose files no manifest lists."""
    del tree.files[MANIFEST_NAME]
    root = written(tree, tmp_path / "dataset")
    os.truncate(root / name, 1 << 40)
    with pytest.raises(CommitDamaged, match=rf"{name}: size"):
        Store(root).read(name)
    with pytest.raises(ColdstillError, match=r"size|units"):
        seal(Store(root))


def test_a_commit_record_of_a_unit_beyond_any_number_does_not_end_a_status(tree: Tree, tmp_path: Path) -> None:
    del tree.files[MANIFEST_NAME]
    tree.files[f"commits/{'9' * 30}.json"] = b"{}"
    status = read_status(str(written(tree, tmp_path / "dataset")))
    assert status.rows_done == status.rows_planned


def test_a_manifest_of_a_million_unknown_fields_does_not_fill_the_memory(tree: Tree, read: Read) -> None:
    fields = b"".join(b'"%x": 0,' % number for number in range(1_000_000))
    tree.files[MANIFEST_NAME] = b"{" + fields + tree.files[MANIFEST_NAME].lstrip()[1:]
    assert read(tree)["named"]["open"] == "CommitDamaged"


@pytest.mark.parametrize("filling", [b"[],", b"{},", b'"",', b"0,", b'{"name":"","bytes":0,"sha256":""},'])
def test_a_manifest_of_45_megabytes_of_tiny_values_does_not_fill_the_memory(
    tree: Tree, read: Read, filling: bytes
) -> None:
    mark = b'"derived_from": ['
    assert mark in tree.files[MANIFEST_NAME]
    many = filling * (45_000_000 // len(filling))
    tree.files[MANIFEST_NAME] = tree.files[MANIFEST_NAME].replace(mark, mark + many[:-1])
    assert read(tree)["named"]["open"] == "CommitDamaged"


@pytest.mark.parametrize("filling", [b"[],", b"{},", b'"",', b"0,", b'"ab",', b"1e1,"])
@pytest.mark.parametrize("field", [b'"merges": [', b'"added_tokens": ['])
def test_a_tokenizer_of_45_megabytes_of_tiny_values_does_not_fill_the_memory(
    tree: Tree, read: Read, filling: bytes, field: bytes
) -> None:
    name = "tokenizer/tokenizer.json"
    many = filling * (45_000_000 // len(filling))
    tree.files[name] = tree.files[name].replace(field + b"]", field + many[:-1] + b"]")
    tree.files[name] = tree.files[name].replace(field + b"{", field + many + b"{")
    tree.reseal()
    assert read(tree)["findings"] == ["TokenizerNotFound"]


def test_the_settings_of_a_tokenizer_of_tiny_values_do_not_fill_the_memory(tree: Tree, read: Read) -> None:
    name, data = "tokenizer/tokenizer_config.json", b'{"a": [' + b"[]," * 15_000_000 + b"0]}"
    tree.files[name] = data
    change_document(tree, MANIFEST_NAME, lambda found: found["files"].append(file_record(name, data).model_dump()))
    assert read(tree)["findings"] == ["TokenizerNotFound"]


def test_a_tokenizer_of_tiny_values_is_opened_by_no_library(tree: Tree, tmp_path: Path) -> None:
    """The parser of `tokenizers` ends the process where the memory ends."""
    name = "tokenizer/tokenizer.json"
    tree.files[name] = tree.files[name].rstrip()[:-1] + b', "a": [' + b"[]," * 15_000_000 + b"0]}"
    tree.reseal()
    dataset = open_dataset(written(tree, tmp_path / "dataset"))
    with pytest.raises(TokenizerUnreadable, match="values"):
        TokenText(dataset)
    with pytest.raises(TokenizerNotFound, match="values"):
        dataset.tokenizer_files()


def test_metadata_that_are_too_long_are_not_parsed(tree: Tree, read: Read) -> None:
    change_row(tree, metadata='{"a": [' + "[]," * 500_000 + "0]}")
    assert read(tree)["named"]["rows"] == "InvalidRow"


def test_a_sample_id_that_is_too_long_is_refused(tree: Tree, read: Read) -> None:
    change_row(tree, sample_id="\0" * (1 << 20))
    assert read(tree)["named"]["rows"] == "InvalidRow"


@pytest.mark.parametrize("column", ["sample_id", "metadata", "token_ids", "target_spans"])
def test_a_column_that_is_larger_than_its_rows_can_be_is_refused_from_the_footer_alone(
    tree: Tree, read: Read, column: str
) -> None:
    change_row(
        tree, **{column: "0" * 3_000_000 if column in ("sample_id", "metadata") else np.zeros(3_000_000, np.int32)}
    )
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_too_many_media_are_not_made(tree: Tree, read: Read) -> None:
    item = {"position": 1, "type": "", "sha256": "", "path": None, "bytes": None}
    change_row(tree, media=[item] * 500_000)
    assert read(tree)["named"]["rows"] == "InvalidRow"


def test_a_row_of_a_million_spans_is_read_in_time(tree: Tree, read: Read) -> None:
    change_document(tree, HEADER_NAME, lambda header: header.update(max_length=1 << 20))
    name, count = first_shard(tree), 1 << 20
    tree.files[name] = shard_rows.write_rows(shard_rows.rows_of(tree.files[name]), header=tree.files[HEADER_NAME])
    edges = np.arange(count - 2).repeat(2)[1:-1]  # of one position each: as many as there can be
    change_row(tree, token_ids=np.zeros(count, np.int32), target_spans=edges)
    assert read(tree)["named"]["rows"] == "StreamDamaged"


def test_a_row_of_too_many_tokens_is_refused(tree: Tree, read: Read) -> None:
    change_row(tree, token_ids=np.zeros(1 << 20, np.int32))
    assert read(tree)["named"]["rows"] == "InvalidRow"
