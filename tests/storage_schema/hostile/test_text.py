"""Text that is nested too deeply, is not UTF-8, has numbers out of range, or that a web page would execute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import HEADER_NAME
from coldstill.storage_schema.manifest import MANIFEST_NAME
from tests.fuzz.parquet_parts import Parts
from tests.fuzz.thrift import BINARY, Struct
from tests.fuzz.tree import Tree
from tests.storage_schema.hostile.changes import (
    LONG,
    Read,
    change_document,
    change_footer,
    change_parts,
    change_row,
    column_of,
    first_shard,
    short,
    written,
)


@pytest.mark.parametrize("depth", [50, 900, 5000, 100_000])
@pytest.mark.parametrize("name", [MANIFEST_NAME, HEADER_NAME, "commits/000000.json", "tokenizer/tokenizer.json"])
def test_documents_that_are_too_deep_are_named(tree: Tree, read: Read, name: str, depth: int) -> None:
    tree.files[name] = b'{"model": ' + b"[" * depth + b"]" * depth + b"}"
    tree.reseal()
    answer = read(tree)
    assert answer["named"].get("commits") or answer["named"].get("open") or answer["findings"]


@pytest.mark.parametrize("depth", [900, 5000, 500_000])
def test_metadata_that_are_too_deep_are_named(tree: Tree, read: Read, depth: int) -> None:
    change_row(tree, metadata='{"a":' + "[" * depth + "]" * depth + "}")
    answer = read(tree)
    assert answer["named"].get("rows") == ("ShardDamaged" if depth > 900 else None)


@pytest.mark.parametrize("number", [LONG, "-" + LONG], ids=short)
def test_integers_beyond_python_s_own_limit_are_named(tree: Tree, read: Read, number: str) -> None:
    change_row(tree, metadata='{"a": ' + number + "}")
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("number", [LONG, "1e999", "-1e999", "NaN", "Infinity", str(1 << 64), "1.0"], ids=short)
@pytest.mark.parametrize("field", ["top_k", "draw_seed", "max_length", "rows_per_unit"])
def test_numbers_in_a_header_that_are_no_integers_of_64_bits_are_named(
    tree: Tree, read: Read, field: str, number: str
) -> None:
    change_document(tree, HEADER_NAME, lambda header: header.update({field: "MARK"}))
    tree.files[HEADER_NAME] = tree.files[HEADER_NAME].replace(b'"MARK"', number.encode())
    tree.reseal()
    answer = read(tree)
    assert answer["named"].get("open") == "InvalidHeader" or answer["named"].get("rows") == "HeaderMismatch"


@pytest.mark.parametrize("number", [LONG, "1e999", "NaN", "-1", "1048577", str(1 << 64)], ids=short)
def test_token_ids_of_a_tokenizer_that_are_out_of_bounds_are_named(tree: Tree, read: Read, number: str) -> None:
    name = "tokenizer/tokenizer.json"
    tree.files[name] = tree.files[name].replace(b'"t7": 7', b'"t7": ' + number.encode())
    tree.reseal()
    assert read(tree)["findings"][0] in ("TokenizerNotFound", "TokenizerMismatch")


@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf8\x88\x80\x80\x80", b"\xc3"])
@pytest.mark.parametrize("column", ["sample_id", "metadata", "type", "path", "sha256"])
def test_text_that_is_no_utf_8_is_named(tree: Tree, read: Read, column: str, text: bytes) -> None:
    if column in ("sample_id", "metadata"):
        change_row(tree, **{column: text})
        assert read(tree)["named"]["rows"] == "ShardDamaged"
        return
    data = tree.files[first_shard(tree)]
    item = {"position": 1, "type": "image/png", "sha256": "0" * 64, "path": "media/cat.png", "bytes": None}
    change_row(tree, media=[item])
    sound = {"type": b"image/png", "path": b"media/cat.png", "sha256": b"0" * 64}[column]

    def spoil(parts: Parts) -> None:
        for chunk in parts.chunks:
            for page in chunk.pages:
                content = chunk.content(page)
                if sound in content:
                    chunk.replace(page, content.replace(sound, (text + sound)[: len(sound)]))

    change_parts(tree, spoil)
    assert tree.files[first_shard(tree)] != data
    assert read(tree)["named"]["rows"] == "ShardDamaged"


@pytest.mark.parametrize("number", [1, 3, 9])
def test_a_column_name_in_the_footer_that_is_no_utf_8_is_named(tree: Tree, read: Read, number: int) -> None:
    change_footer(tree, lambda footer: footer.get(2).values[number].set(4, b"\xff\xfe", BINARY))
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_a_path_of_a_column_in_the_footer_that_is_no_utf_8_is_named(tree: Tree, read: Read) -> None:
    def spoil(footer: Struct) -> None:
        column_of(footer.get(4).values[0], "metadata").get(3).values[0] = b"\x80metadata"

    change_footer(tree, spoil)
    assert read(tree)["named"]["rows"] == "ShardDamaged"


def test_script_tags_are_data(tree: Tree, tmp_path: Path) -> None:
    script = '</script><script>alert("1")</script>\u2028<img src=x onerror=alert(1)>'
    change_row(tree, sample_id=script, metadata=json.dumps({script: script}))
    row = open_dataset(written(tree, tmp_path / "dataset")).row(0)
    assert (row.sample_id, row.metadata) == (script, {script: script})
