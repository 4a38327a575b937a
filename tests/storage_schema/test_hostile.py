"""What strangers can put into a dataset, one by one. Each has a name, before it costs memory, time, or runs code.

Datasets are read as the campaign reads them: in a child process of 1 GiB of address space and 2 s for each.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from storage_schema import open_dataset
from storage_schema.codec import STREAMS
from storage_schema.commits import read_commit
from storage_schema.errors import ColdstillError, CommitDamaged
from storage_schema.header import HEADER_NAME
from storage_schema.manifest import MANIFEST_NAME
from storage_schema.shard import SCHEMA
from storage_schema.store import Store
from storage_schema.tools.verify import verify
from tests.fuzz import shard_rows
from tests.fuzz.bases import Base, make_bases
from tests.fuzz.children import Child
from tests.fuzz.parquet_parts import PAGE_RAW, Parts, split, with_footer
from tests.fuzz.thrift import BINARY, I32, I64, STRUCT, Field, Struct, write_struct
from tests.fuzz.tree import Tree

NAMES = (
    "../x",
    "shards/../../x",
    "/etc/passwd",
    "..\\x",
    "C:\\x",
    "a\\b",
    "a\0b",
    "",
    ".",
    "a//b",
    "a/./b",
    "a/",
    "a\nb",
)

LONG = "9" * 5000


def str_of(value: str) -> str:
    """A short name of a parameter."""
    return value[:20].strip('"')


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def tree(bases: list[Base]) -> Tree:
    """The files of a dataset with every stream, to be changed."""
    return Tree(bases[0].files)


@pytest.fixture(scope="module")
def child(bases: list[Base]) -> Iterator[Child]:
    with Child(bases[0].root) as child:
        yield child


@pytest.fixture
def read(child: Child, tmp_path: Path) -> Callable[[Tree], dict[str, Any]]:
    """Have a child read the files, resealed by the caller or not."""

    def run(tree: Tree) -> dict[str, Any]:
        answer = child.read(_written(tree, tmp_path / "dataset"))
        assert not answer.get("died")
        assert not answer.get("unnamed")
        return answer

    return run


def _written(tree: Tree, root: Path) -> Path:
    for name, data in tree.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def _document(tree: Tree, name: str, change: Callable[[Any], object]) -> None:
    document = json.loads(tree.files[name])
    change(document)
    tree.files[name] = json.dumps(document).encode()


def _shard(tree: Tree) -> str:
    return tree.named("shards/")[0]


def _change_parts(tree: Tree, change: Callable[[Parts], object]) -> None:
    """Change the parts of the first shard, and reseal."""
    parts = Parts(tree.files[_shard(tree)])
    change(parts)
    tree.files[_shard(tree)] = parts.to_bytes()
    tree.reseal()


def _change_footer(tree: Tree, change: Callable[[Struct], object]) -> None:
    """Change the footer of the first shard behind pages that stay, and reseal."""
    data = tree.files[_shard(tree)]
    parts = Parts(data)
    change(parts.footer)
    tree.files[_shard(tree)] = with_footer(split(data)[0], write_struct(parts.footer))
    tree.reseal()


def _change_row(tree: Tree, **values: Any) -> None:
    """Other values in the first row of the first shard, under right digests and counts."""
    data = tree.files[_shard(tree)]
    rows = shard_rows.rows_of(data)
    rows[0].update(values)
    tree.files[_shard(tree)] = shard_rows.write_rows(rows, header=shard_rows.header_of(data), group_rows=1)
    tree.reseal()


def _column(group: Struct, path: str) -> Struct:
    """The facts of a column chunk by its path."""
    facts = [chunk.get(3) for chunk in group.get(1).values]
    return next(fact for fact in facts if b".".join(fact.get(3).values).decode() == path)


class TestPathTraversal:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("which", ["shards", "files"])
    def test_a_name_in_the_manifest_that_leaves_the_dataset_is_refused(
        self, tree: Tree, tmp_path: Path, name: str, which: str
    ) -> None:
        def rename(document: Any) -> None:
            record = document["shards"][0]["file"] if which == "shards" else document["files"][0]
            record["name"] = name

        _document(tree, MANIFEST_NAME, rename)
        with pytest.raises(CommitDamaged, match="inside the dataset"):
            open_dataset(_written(tree, tmp_path / "dataset"))

    @pytest.mark.parametrize("name", NAMES)
    def test_a_name_in_a_commit_record_that_leaves_the_dataset_is_never_read(
        self, tree: Tree, tmp_path: Path, name: str
    ) -> None:
        _document(tree, "commits/000000.json", lambda document: document["shard"].update(name=name))
        store = Store(_written(tree, tmp_path / "dataset"))
        with pytest.raises(CommitDamaged, match="inside the dataset"):
            store.read(read_commit(store, 0).shard.name)

    @pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "media/../x", "media/a/b", "media/a\0", "x.png", ""])
    def test_a_path_of_media_outside_their_folder_is_refused(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], path: str
    ) -> None:
        media = {"position": 1, "type": "image/png", "sha256": "0" * 64, "path": path, "bytes": None}
        _change_row(tree, media=[media])
        assert read(tree)["named"]["rows"] == "InvalidRow"

    def test_a_link_that_leads_out_of_the_dataset_is_refused(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], tmp_path: Path
    ) -> None:
        root = _written(tree, tmp_path / "dataset")
        for name in (_shard(tree), "tokenizer/tokenizer.json"):
            data = tree.files.pop(name)
            (tmp_path / "outside").write_bytes(data)
            (root / name).unlink()
            (root / name).symlink_to(tmp_path / "outside")
        answer = read(tree)
        assert answer["named"]["rows"] == answer["named"]["single"] == "OutsideDataset"
        assert set(answer["findings"]) == {"OutsideDataset"}

    def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], tmp_path: Path
    ) -> None:
        root = _written(tree, tmp_path / "dataset")
        name = _shard(tree)
        del tree.files[name]
        (root / name).unlink()
        os.mkfifo(root / name)
        assert read(tree)["named"]["rows"] == "OutsideDataset"


class TestSizes:
    def test_a_header_of_100_megabytes_is_not_parsed(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        tree.files[HEADER_NAME] = tree.files[HEADER_NAME].replace(b'"tiny"', b'"' + b"a" * 100_000_000 + b'"')
        tree.reseal()
        assert read(tree)["named"]["open"] in ("InvalidHeader", "FileDamaged")

    def test_a_header_in_a_footer_that_is_too_large_is_not_parsed(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        header = tree.files[HEADER_NAME]
        _change_parts(tree, lambda parts: parts.set_header(header + b" " * (1 << 20)))
        assert read(tree)["named"]["rows"] == "InvalidHeader"

    def test_a_footer_that_is_too_large_is_not_read(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        _change_parts(tree, lambda parts: parts.set_header(b" " * (64 << 20)))
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_a_manifest_of_8_gigabytes_is_not_read(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], tmp_path: Path
    ) -> None:
        root = _written(tree, tmp_path / "dataset")
        del tree.files[MANIFEST_NAME]
        os.truncate(root / MANIFEST_NAME, 8 << 30)  # a file of holes: takes no room
        assert isinstance(read(tree)["named"]["open"], str)

    @pytest.mark.parametrize("filling", [b"[],", b"{},", b'"",', b"0,", b'{"name":"","bytes":0,"sha256":""},'])
    def test_a_manifest_of_60_megabytes_of_tiny_values_does_not_fill_the_memory(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], filling: bytes
    ) -> None:
        mark = b'"derived_from": ['
        assert mark in tree.files[MANIFEST_NAME]
        many = filling * (60_000_000 // len(filling))
        tree.files[MANIFEST_NAME] = tree.files[MANIFEST_NAME].replace(mark, mark + many[:-1])
        assert read(tree)["named"]["open"] == "CommitDamaged"

    @pytest.mark.parametrize("filling", [b"[],", b"{},", b'"",', b"0,", b'"ab",', b"1e1,"])
    @pytest.mark.parametrize("field", [b'"merges": [', b'"added_tokens": ['])
    def test_a_tokenizer_of_60_megabytes_of_tiny_values_does_not_fill_the_memory(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], filling: bytes, field: bytes
    ) -> None:
        name = "tokenizer/tokenizer.json"
        many = filling * (60_000_000 // len(filling))
        tree.files[name] = tree.files[name].replace(field + b"]", field + many[:-1] + b"]")
        tree.files[name] = tree.files[name].replace(field + b"{", field + many + b"{")
        tree.reseal()
        assert read(tree)["findings"] == ["TokenizerNotFound"]

    def test_metadata_that_are_too_long_are_not_parsed(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        _change_row(tree, metadata='{"a": [' + "[]," * 500_000 + "0]}")
        assert read(tree)["named"]["rows"] == "InvalidRow"

    def test_a_sample_id_that_is_too_long_is_refused(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        _change_row(tree, sample_id="\0" * (1 << 20))
        assert read(tree)["named"]["rows"] == "InvalidRow"

    @pytest.mark.parametrize("column", ["sample_id", "metadata", "token_ids", "target_spans"])
    def test_a_column_that_is_larger_than_its_rows_can_be_is_refused_from_the_footer_alone(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], column: str
    ) -> None:
        _change_row(
            tree, **{column: "0" * 100_000_000 if column in ("sample_id", "metadata") else np.zeros(25_000_000)}
        )
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_too_many_media_are_not_made(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        item = {"position": 1, "type": "", "sha256": "", "path": None, "bytes": None}
        _change_row(tree, media=[item] * 500_000)
        assert read(tree)["named"]["rows"] == "InvalidRow"

    def test_a_row_of_too_many_tokens_is_refused(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        _change_row(tree, token_ids=np.zeros(1 << 20, np.int32))
        assert read(tree)["named"]["rows"] == "InvalidRow"


class TestDecompressionBombs:
    @pytest.mark.parametrize("size", [1 << 27, 1 << 40, (1 << 64) - 3])
    @pytest.mark.parametrize("stream", ["ids", "logprobs", "counts", "draw_ids", "label_logprob"])
    def test_a_frame_that_declares_more_than_the_counts_demand_is_not_opened(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], stream: str, size: int
    ) -> None:
        frame = (
            struct.pack("<IBQ", 0xFD2FB528, 3 << 6 | 1 << 5, size) + struct.pack("<I", (1 << 17) << 3 | 3)[:3] + b"\0"
        )
        _change_row(tree, **{stream: frame})
        assert read(tree)["named"]["rows"] == "StreamDamaged"

    def test_a_frame_that_holds_more_than_it_declares_is_refused(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        size = len(zstandard.decompress(shard_rows.rows_of(tree.files[_shard(tree)])[0]["log_tail"]))
        block = struct.pack("<I", (1 << 17) << 3 | 2)[:3] + b"\0"
        bomb = struct.pack("<IBBQ", 0xFD2FB528, 3 << 6, 171, size) + block * 8000 + struct.pack("<I", 3)[:3] + b"\0"
        _change_row(tree, log_tail=bomb)
        assert read(tree)["named"]["rows"] == "StreamDamaged"

    @pytest.mark.parametrize("said", [(1 << 31) - 1, 1 << 30, 300 << 20])
    def test_a_page_that_says_it_is_larger_than_the_footer_says_is_not_opened(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], said: int
    ) -> None:
        """The page's header says 2 GB, the footer 1 MB; the frame in it is sound, small, and does hold zeros."""
        parts = Parts(tree.files[_shard(tree)])
        chunk = parts.chunks[3]
        page = chunk.pages[0]
        chunk.replace(page, chunk.content(page) + bytes((1 << 20) - 100))
        body_and_footer = parts.to_bytes()
        page.header.set(PAGE_RAW, said, I32)
        body = parts.body()
        honest = Parts(body_and_footer).footer
        for group in honest.get(4).values:
            group.set(2, 1 << 20, I64)
        grown = len(body) - len(split(body_and_footer)[0])
        _shift_places(honest, by=grown, behind=3)
        tree.files[_shard(tree)] = with_footer(body, write_struct(honest))
        tree.reseal()
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_a_footer_that_says_two_gigabytes_too_is_refused_from_the_footer_alone(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        _change_parts(tree, lambda parts: parts.chunks[3].pages[0].header.set(PAGE_RAW, (1 << 31) - 1, I32))
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_a_page_that_holds_more_than_it_says_is_refused(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        def fill(parts: Parts) -> None:
            page = parts.chunks[3].pages[0]
            page.body = zstandard.compress(bytes(2 << 30))
            page.seal()

        _change_parts(tree, fill)
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_a_column_of_a_hundred_thousand_empty_pages_is_refused(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        def repeat(parts: Parts) -> None:
            empty = Parts(tree.files[_shard(tree)]).chunks[3].pages[0]
            empty.body = zstandard.compress(b"")
            empty.header.set(PAGE_RAW, 0, I32)
            empty.header.get(5).set(1, 0, I32)
            empty.seal()
            parts.chunks[3].pages += [empty] * 100_000

        _change_parts(tree, repeat)
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("kept", [0, 1])
    def test_the_largest_row_that_the_format_allows_takes_less_than_a_gibibyte(
        self, tree: Tree, child: Child, tmp_path: Path, kept: int
    ) -> None:
        """A few kB that stand for 2^24 entries. It is read in four ways, so the limit of 2 s is not asked."""
        positions, width = 4096, 4096
        _document(
            tree,
            HEADER_NAME,
            lambda header: header.update(
                top_k=width, token_count=1 << 20, vocab_size=1 << 20, max_length=1 << 20, draw_logprobs=False
            ),
        )
        count = np.full(positions, width - kept)
        total = int(count.sum())
        planes = lambda values: np.asarray(values, "<u2").view(np.uint8).reshape(-1, 2).T.tobytes()  # noqa: E731
        frame = lambda content: zstandard.ZstdCompressor(write_checksum=True).compress(content)  # noqa: E731
        row = dict.fromkeys(STREAMS, b"") | {
            "sample_id": "large",
            "metadata": "{}",
            "media": [],
            "token_ids": np.zeros(positions + 1, np.int32),
            "target_spans": [0, positions],
            "counts": frame(planes(count)) if kept else b"",
            "ids": frame(bytes(total)),
            "logprobs": frame(bytes(total)),
            "last_levels": frame(planes(np.full(positions, 270))),
            "log_tail": frame(planes(np.full(positions, 270))),
        }
        name = _shard(tree)
        tree.files[name] = shard_rows.write_rows([row], header=tree.files[HEADER_NAME])
        tree.files[tree.named("shards/")[1]] = tree.files[name]
        tree.reseal()
        for shard in range(2):
            tree.recount(shard, rows=1, tokens=positions + 1, targets=positions)
        root = _written(tree, tmp_path / "dataset")
        answer = child.read(root, cpu_seconds=60.0)
        assert not answer.get("died")
        assert not answer["unnamed"]
        assert "rows" not in answer["named"]


def _shift_places(footer: Struct, *, by: int, behind: int) -> None:
    """Move the places of the column chunks behind number `behind` of a file's first group, and all of later ones."""
    number = 0
    for group in footer.get(4).values:
        for column in group.get(1).values:
            facts = column.get(3)
            if number == behind:
                facts.set(7, facts.get(7) + by, I64)
                facts.set(6, facts.get(6) + by, I64)
            elif number > behind:
                facts.set(9, facts.get(9) + by, I64)
            number += 1


class TestLyingCounts:
    @pytest.mark.parametrize("name", ["rows", "tokens", "targets", "rejected"])
    @pytest.mark.parametrize("value", [-1, 0, 4, 1 << 40, 1 << 63, 10**30, 2.5, True, "3"])
    def test_sums_in_the_manifest(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], name: str, value: object
    ) -> None:
        if json.loads(tree.files[MANIFEST_NAME])[name] != value:
            _document(tree, MANIFEST_NAME, lambda document: document.update({name: value}))
            assert read(tree)["named"]["open"] == "CommitDamaged"

    @pytest.mark.parametrize("name", ["rows", "tokens", "targets"])
    def test_counts_of_a_shard_in_the_manifest(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], name: str
    ) -> None:
        def lie(document: Any) -> None:
            document["shards"][0][name] += 1
            document[name] += 1

        _document(tree, MANIFEST_NAME, lie)
        assert "ShardDamaged" in read(tree)["findings"]

    @pytest.mark.parametrize("name", ["unit", "rows", "tokens", "targets", "rejected"])
    @pytest.mark.parametrize("text", ["-1", LONG, "1e400", "NaN", "1.5", '"1"', "null", "[1]"], ids=str_of)
    def test_counts_of_a_commit_record(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], name: str, text: str
    ) -> None:
        _document(tree, "commits/000000.json", lambda document: document.update({name: "MARK"}))
        tree.files["commits/000000.json"] = tree.files["commits/000000.json"].replace(b'"MARK"', text.encode())
        assert read(tree)["named"]["commits"] == "CommitDamaged"

    @pytest.mark.parametrize("value", [-1, 0, 2, 4, 1025, 1 << 20, 1 << 31, 1 << 62])
    def test_rows_of_a_row_group(self, tree: Tree, read: Callable[[Tree], dict[str, Any]], value: int) -> None:
        def lie(footer: Struct) -> None:
            footer.set(3, value, I64)
            footer.get(4).values[0].set(3, value, I64)

        _change_footer(tree, lie)
        if 0 < value <= 1024:
            tree.recount(0, rows=value, tokens=1, targets=1)
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("column", ["sample_id", "token_ids.list.element", "media.list.element.path", "ids"])
    @pytest.mark.parametrize("value", [-1, 0, 1 << 20, 1 << 28, 1 << 40, 1 << 62])
    def test_values_of_a_column_in_the_footer(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], column: str, value: int
    ) -> None:
        _change_footer(tree, lambda footer: _column(footer.get(4).values[0], column).set(5, value, I64))
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("chunk", [0, 1, 8])
    @pytest.mark.parametrize("value", [-1, 0, 1 << 28, (1 << 31) - 1])
    def test_values_of_a_page(self, tree: Tree, read: Callable[[Tree], dict[str, Any]], chunk: int, value: int) -> None:
        _change_parts(tree, lambda parts: parts.chunks[chunk].pages[0].header.get(5).set(1, value, I32))
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("value", [0, 9, 255])
    def test_kept_ids_of_a_position(self, tree: Tree, read: Callable[[Tree], dict[str, Any]], value: int) -> None:
        row = shard_rows.rows_of(tree.files[_shard(tree)])[0]
        content = zstandard.decompress(row["counts"])
        _change_row(tree, counts=zstandard.compress(bytes([value]) * len(content)))
        assert read(tree)["named"]["rows"] == "StreamDamaged"


class TestOtherDatasets:
    @pytest.mark.parametrize(
        ("field", "value"), [("top_k", 9), ("token_count", 300), ("source_sha256", "1" * 64), ("licence", "other")]
    )
    def test_a_header_that_differs_from_the_footer_s_is_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], field: str, value: object
    ) -> None:
        _document(tree, HEADER_NAME, lambda header: header.update({field: value}))
        tree.reseal()
        assert read(tree)["named"]["rows"] == "HeaderMismatch"

    def test_a_shard_of_another_dataset_is_named(
        self, tree: Tree, bases: list[Base], read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        tree.files[_shard(tree)] = next(data for name, data in bases[1].files.items() if name.startswith("shards/"))
        tree.reseal()
        assert read(tree)["named"]["rows"] == "HeaderMismatch"

    def test_shards_that_changed_places_are_named(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        first, second = tree.named("shards/")
        tree.files[first], tree.files[second] = tree.files[second], tree.files[first]
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("key_values", ["none", "twice", "not UTF-8"])
    def test_a_footer_without_one_header_is_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], key_values: str
    ) -> None:
        def change(parts: Parts) -> None:
            pairs = parts.key_values
            if key_values == "none":
                pairs.clear()
            elif key_values == "twice":
                pairs.append(pairs[0])
            else:
                parts.set_header(b"\xff\xfe" + pairs[0].get(2))

        _change_parts(tree, change)
        assert read(tree)["named"]["rows"] in ("ShardDamaged", "InvalidHeader")


class _Planted:
    """What a pickle can do: make a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a pickle was opened")


@pytest.mark.parametrize("sealed", [True, False])
def test_pickles_in_the_place_of_files_are_never_opened(
    bases: list[Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    planted = tmp_path / "planted"
    for loader in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, loader, _refuse)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # as torch.save and np.savez write
        file.writestr("archive/data.pkl", pickle.dumps(_Planted(planted)))
    for number, name in enumerate(sorted(bases[2].files)):
        for kind, data in enumerate((pickle.dumps(_Planted(planted)), archive.getvalue())):
            tree = Tree(bases[2].files)
            tree.files[name] = data
            tree.files["extra.pkl"] = data
            if sealed:
                tree.reseal()
            root = _written(tree, tmp_path / f"{number}-{kind}")
            if not name.startswith(("commits/", "rejects/")) and not (sealed and name.startswith("media/")):
                with pytest.raises(ColdstillError):
                    _fail_on_findings(root)
            elif name.startswith("commits/"):
                with pytest.raises(CommitDamaged):
                    read_commit(Store(root), int(Path(name).stem))
    assert not planted.exists()


def _fail_on_findings(root: Path) -> None:
    findings = verify(root, deep=True, progress=False)
    if findings:
        raise ColdstillError(findings[0].message)


class TestText:
    @pytest.mark.parametrize("depth", [50, 900, 5000, 100_000])
    @pytest.mark.parametrize("name", [MANIFEST_NAME, HEADER_NAME, "commits/000000.json", "tokenizer/tokenizer.json"])
    def test_documents_that_are_too_deep_are_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], name: str, depth: int
    ) -> None:
        tree.files[name] = b'{"model": ' + b"[" * depth + b"]" * depth + b"}"
        tree.reseal()
        answer = read(tree)
        assert answer["named"].get("commits") or answer["named"].get("open") or answer["findings"]

    @pytest.mark.parametrize("depth", [900, 5000, 500_000])
    def test_metadata_that_are_too_deep_are_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], depth: int
    ) -> None:
        _change_row(tree, metadata='{"a":' + "[" * depth + "]" * depth + "}")
        answer = read(tree)
        assert answer["named"].get("rows") == ("ShardDamaged" if depth > 900 else None)

    @pytest.mark.parametrize("number", [LONG, "-" + LONG], ids=str_of)
    def test_integers_beyond_python_s_own_limit_are_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], number: str
    ) -> None:
        _change_row(tree, metadata='{"a": ' + number + "}")
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("number", [LONG, "1e999", "-1e999", "NaN", "Infinity", str(1 << 64), "1.0"], ids=str_of)
    @pytest.mark.parametrize("field", ["top_k", "draw_seed", "max_length", "rows_per_unit"])
    def test_numbers_in_a_header_that_are_no_integers_of_64_bits_are_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], field: str, number: str
    ) -> None:
        _document(tree, HEADER_NAME, lambda header: header.update({field: "MARK"}))
        tree.files[HEADER_NAME] = tree.files[HEADER_NAME].replace(b'"MARK"', number.encode())
        tree.reseal()
        answer = read(tree)
        assert answer["named"].get("open") == "InvalidHeader" or answer["named"].get("rows") == "HeaderMismatch"

    @pytest.mark.parametrize("number", [LONG, "1e999", "NaN", "-1", "1048577", str(1 << 64)], ids=str_of)
    def test_token_ids_of_a_tokenizer_that_are_out_of_bounds_are_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], number: str
    ) -> None:
        name = "tokenizer/tokenizer.json"
        tree.files[name] = tree.files[name].replace(b'"t7": 7', b'"t7": ' + number.encode())
        tree.reseal()
        assert read(tree)["findings"][0] in ("TokenizerNotFound", "TokenizerMismatch")

    @pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf8\x88\x80\x80\x80", b"\xc3"])
    @pytest.mark.parametrize("column", ["sample_id", "metadata", "type", "path", "sha256"])
    def test_text_that_is_no_utf_8_is_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], column: str, text: bytes
    ) -> None:
        if column in ("sample_id", "metadata"):
            _change_row(tree, **{column: text})
            assert read(tree)["named"]["rows"] == "ShardDamaged"
            return
        data = tree.files[_shard(tree)]
        item = {"position": 1, "type": "image/png", "sha256": "0" * 64, "path": "media/cat.png", "bytes": None}
        _change_row(tree, media=[item])
        sound = {"type": b"image/png", "path": b"media/cat.png", "sha256": b"0" * 64}[column]

        def spoil(parts: Parts) -> None:
            for chunk in parts.chunks:
                for page in chunk.pages:
                    content = chunk.content(page)
                    if sound in content:
                        chunk.replace(page, content.replace(sound, (text + sound)[: len(sound)]))

        _change_parts(tree, spoil)
        assert tree.files[_shard(tree)] != data
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("number", [1, 3, 9])
    def test_a_column_name_in_the_footer_that_is_no_utf_8_is_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], number: int
    ) -> None:
        _change_footer(tree, lambda footer: footer.get(2).values[number].set(4, b"\xff\xfe", BINARY))
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_script_tags_are_data(self, tree: Tree, tmp_path: Path) -> None:
        script = '</script><script>alert("1")</script>\u2028<img src=x onerror=alert(1)>'
        _change_row(tree, sample_id=script, metadata=json.dumps({script: script}))
        row = open_dataset(_written(tree, tmp_path / "dataset")).row(0)
        assert (row.sample_id, row.metadata) == (script, {script: script})


class TestFooters:
    @pytest.mark.parametrize("codec", [-1, 1, 2, 3, 4, 5, 7, 8, 1 << 20, (1 << 32) + 6])
    @pytest.mark.parametrize("column", ["metadata", "ids"])
    def test_an_unknown_compression_does_not_end_the_process(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], column: str, codec: int
    ) -> None:
        """pyarrow aborts where its `compression` accessor meets a codec that it does not know."""
        _change_footer(tree, lambda footer: _column(footer.get(4).values[0], column).set(4, codec, I32))
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    @pytest.mark.parametrize("name", ["plan.parquet", "faithfulness.parquet"])
    def test_an_unknown_compression_of_a_small_table_does_not_end_the_process(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], name: str
    ) -> None:
        parts = Parts(tree.files[name])
        parts.chunks[0].facts.set(4, -1, I32)
        tree.files[name] = parts.to_bytes()
        tree.reseal()
        assert "Damaged" in read(tree)["findings"][0]

    @pytest.mark.parametrize("depth", [5, 60, 400])
    def test_a_footer_that_is_too_deep_is_named(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]], depth: int
    ) -> None:
        def nest(footer: Struct) -> None:
            inner = Struct()
            for _ in range(depth):
                inner = Struct([Field(1, STRUCT, inner)])
            footer.fields.append(Field(99, STRUCT, inner))

        _change_footer(tree, nest)
        assert read(tree)["named"].get("rows") == (None if depth == 5 else "ShardDamaged")

    def test_row_groups_that_share_their_pages_are_refused(
        self, tree: Tree, read: Callable[[Tree], dict[str, Any]]
    ) -> None:
        """A small file would be a large dataset."""

        def repeat(footer: Struct) -> None:
            groups = footer.get(4).values
            groups += [groups[0]] * 199
            footer.set(3, 200 * groups[0].get(3), I64)

        _change_footer(tree, repeat)
        tree.recount(0, rows=600, tokens=1, targets=1)
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_a_column_in_another_file_is_refused(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        def point(footer: Struct) -> None:
            footer.get(4).values[0].get(1).values[0].fields.insert(0, Field(1, BINARY, b"/etc/passwd"))

        _change_footer(tree, point)
        assert read(tree)["named"]["rows"] == "ShardDamaged"

    def test_a_null_where_none_belongs_is_refused(self, tree: Tree, read: Callable[[Tree], dict[str, Any]]) -> None:
        data = tree.files[_shard(tree)]
        table = pa.Table.from_pylist(shard_rows.rows_of(data), schema=SCHEMA)
        for name in ("sample_id", "token_ids", "ids", "media"):
            column = table.schema.get_field_index(name)
            field = SCHEMA.field(name)
            nulls = pa.array([None] * table.num_rows, field.type)
            spoilt = table.set_column(column, field.with_nullable(True), nulls)
            header = shard_rows.header_of(data)
            changed = Tree(tree.files)
            changed.files[_shard(tree)] = shard_rows.write_table(spoilt, header=header)
            changed.reseal()
            assert read(changed)["named"]["rows"] == "ShardDamaged"
