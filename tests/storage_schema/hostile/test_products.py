"""Small datasets of strangers whose sizes multiply: each factor is within its limit, and the product is bounded too.

What is shown of a token, of a row and of a page has limits together; so has what a tool holds in memory or writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from coldstill.common.errors import MAX_MESSAGE_CHARS, ColdstillError
from coldstill.common.visible import json_start
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import InvalidRow
from coldstill.storage_schema.manifest import MANIFEST_NAME
from coldstill.storage_schema.rows import MediaReference
from coldstill.storage_schema.shard.layout import is_too_deep
from coldstill.tools.card.card import write_card
from coldstill.tools.card_text import CARD_NAME, with_shards
from coldstill.tools.errors import NotExportable
from coldstill.tools.exchange import export
from coldstill.tools.inspect import page, terminal
from coldstill.tools.inspect.page import write_page
from coldstill.tools.inspect.terminal import show_dataset, show_row
from coldstill.tools.inspect.token_text import MAX_CHARS, TokenText
from coldstill.tools.verify import MAX_FINDINGS, verify
from tests import making
from tests.tools.inspect import strange_tokens

LONG = 1 << 20
ID = 1_000_000
MANY = 1_500
SECONDS = 60.0
"""Far above what any of these takes on a slow machine, and far below what they took without limits."""
PAGE_BYTES = 40 << 20


def bomb(folder: Path, tokens: tuple[str, ...], ids: np.ndarray, **changes: Any) -> Path:
    """A dataset of one row with these token ids."""
    tokenizer = strange_tokens.plain_tokenizer(tokens, folder / "tokenizer")
    row = strange_tokens.row_of(ids, vocabulary=len(tokens), top_k=4)
    row = dataclasses.replace(row, **changes)
    header = making.tiny_header(tokenizer, top_k=4, max_length=1 << 20, draw_logprobs=True)
    making.write_dataset(folder / "dataset", [[row]], header=header, tokenizer=tokenizer)
    return folder / "dataset"


def shown(root: Path) -> str:
    console = Console(file=io.StringIO(), width=100)
    show_dataset(root, console=console)
    show_row(root, 0, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def in_time(started: float) -> bool:
    return time.monotonic() - started < SECONDS


@pytest.mark.parametrize("kind", ["one token", "another token at each position", "characters that are escaped"])
def test_long_tokens_at_many_positions_are_shown_in_bounded_time_and_size(tmp_path: Path, kind: str) -> None:
    many = 500 if kind == "another token at each position" else 1
    size = LONG // many
    sign = "\U000e0001" if kind == "characters that are escaped" else "a"
    tokens = (*(sign * size + str(n) for n in range(many)), *(f"w{n}" for n in range(8)))
    root = bomb(tmp_path, tokens, np.arange(MANY if kind == "one token" else 500) % many)
    started = time.monotonic()
    assert len(shown(root)) < 10 * MAX_CHARS
    assert write_page(root, 0, tmp_path / "page.html").stat().st_size < PAGE_BYTES
    assert in_time(started)


def test_a_row_beyond_what_is_shown_is_cut_with_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (terminal, page):
        monkeypatch.setattr(module, "MAX_TOKENS", 300)
    monkeypatch.setattr(terminal, "MAX_TARGETS", 100)
    root = bomb(tmp_path, tuple(f"{n} " * 10 for n in range(64)), np.arange(500) % 64)
    text = shown(root)
    assert "The first 300 of 500 tokens" in text
    assert "The first 100 of 499 targets" in text
    assert "--html PAGE" in text
    assert page.write_page(root, 0, tmp_path / "page.html").stat().st_size < 200_000


def test_the_text_of_a_row_is_bounded_whatever_its_tokens_are(tmp_path: Path) -> None:
    from coldstill.storage_schema.dataset import open_dataset

    tokens = tuple("\U000e0001" * 1000 + str(n) for n in range(64))
    text = TokenText(open_dataset(bomb(tmp_path, tokens, np.arange(64))))
    ids = [n % 64 for n in range(20_000)]
    assert sum(map(len, text.pieces(ids))) < 2 * MAX_CHARS
    assert len(text.row(ids)) <= MAX_CHARS + 1


def test_an_id_and_metadata_of_a_megabyte_are_cut_where_they_are_shown(tmp_path: Path) -> None:
    deep: Any = list(range(20_000))
    for _ in range(800):
        deep = [deep]  # indented, each number would take 1,600 spaces
    strange = "\U000e0001" * 200_000
    root = bomb(tmp_path, ("a", "b", "c", "d"), np.arange(8) % 4, sample_id=strange, metadata={"deep": deep})
    started = time.monotonic()
    assert len(shown(root)) < 100_000
    assert write_page(root, 0, tmp_path / "page.html").stat().st_size < 1 << 20
    assert in_time(started)
    assert len(json_start({"a": "\U000e0001" * 1000}, 500)) <= 501


@pytest.mark.slow
def test_the_card_of_a_bomb_is_small(tmp_path: Path) -> None:
    root = bomb(tmp_path, ("a" * LONG, "b", "c", "d"), np.zeros(MANY, np.int64), sample_id="x" * ID)
    write_card(root, progress=False)
    assert (root / CARD_NAME).stat().st_size < 64 << 10


def test_an_export_holds_a_bounded_part_of_rows_with_much_metadata(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "GROUP_BYTES", 1 << 20)
    row = making.random_row(np.random.default_rng(0), "row", length=4)
    rows = [dataclasses.replace(row, sample_id=f"row-{n}", metadata={"a": "x" * 500_000}) for n in range(64)]
    root = tmp_path / "dataset"
    making.write_dataset(
        root, [rows[:32], rows[32:]], header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder
    )
    groups: list[int] = []
    real = export._table
    monkeypatch.setattr(export, "_table", lambda group, schema: groups.append(len(group)) or real(group, schema))
    export.export_plain(root, tmp_path / "plain", progress=False)
    assert max(groups) <= 3


def test_a_row_whose_export_would_multiply_tokens_by_k_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = bomb(tmp_path, ("a", "b", "c", "d"), np.arange(100) % 4, sample_id="x" * ID)
    monkeypatch.setattr(export, "MAX_AXOLOTL_ENTRIES", 399)
    with pytest.raises(NotExportable, match="tokens x K") as raised:
        export.export_axolotl(root, tmp_path / "axolotl", progress=False)
    assert len(str(raised.value)) <= MAX_MESSAGE_CHARS


def test_long_ids_that_several_rows_have_are_not_held(tmp_path: Path) -> None:
    """Compressed, an id of a megabyte takes a hundred bytes of a shard."""
    one = making.random_row(np.random.default_rng(0), "a")
    ids = [f"{number:02}" + "a" * 900_000 for number in range(30)] * 2
    tokenizer = making.tiny_tokenizer(tmp_path / "tokenizer")
    rows = [dataclasses.replace(one, sample_id=name) for name in ids]
    making.write_dataset(tmp_path / "dataset", [rows], header=making.tiny_header(tokenizer), tokenizer=tokenizer)
    tracemalloc.start()
    try:
        (finding,) = verify(tmp_path / "dataset", deep=True, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert finding.error == "DuplicateIds"
    assert "30 ids that several rows have, such as '00aaa" in finding.message
    assert peak < 20_000_000


def test_large_rows_that_were_read_are_not_held(tmp_path: Path) -> None:
    """A dataset keeps eight shards open, each with two row groups: of one row each they may have 4 GB."""
    data = bytes(20 << 20)
    image = MediaReference(position=1, type="image/png", sha256=hashlib.sha256(data).hexdigest(), data=data)
    rows = [[dataclasses.replace(row, media=(image,))] * 2 for row in making.random_rows(3)]
    tokenizer = making.tiny_tokenizer(tmp_path / "tokenizer")
    making.write_dataset(tmp_path / "dataset", rows, header=making.tiny_header(tokenizer), tokenizer=tokenizer)
    dataset, before = open_dataset(tmp_path / "dataset"), pa.total_allocated_bytes()
    for number in range(len(dataset)):
        assert dataset.row(number).media == (image,)
    assert pa.total_allocated_bytes() - before < len(data)


def test_a_pattern_takes_time_in_proportion_to_a_strangers_text() -> None:
    """By the square of it, a megabyte took hours."""
    started = time.monotonic()
    assert is_too_deep(b"{" * 1_001 + b'"' + b'\\"' * (LONG // 2))
    assert with_shards(b"---" + b"\n" * LONG, "---\nconfigs:\n---\n").endswith(b"\n" * LONG)
    assert in_time(started)


def test_the_message_of_an_error_is_bounded_whatever_it_quotes() -> None:
    error = InvalidRow("a" * LONG, found="b" * LONG, wanted=["c"] * LONG, fix="run this")
    assert len(str(error)) <= MAX_MESSAGE_CHARS
    assert "do:     run this" in str(error)
    assert len(str(error.at("d" * LONG))) <= MAX_MESSAGE_CHARS
    assert isinstance(error, ColdstillError)


def test_verify_stops_at_a_bounded_number_of_findings(tiny_dataset: Path) -> None:
    document = json.loads((tiny_dataset / MANIFEST_NAME).read_bytes())
    record = document["files"][0]
    document["files"] += [{**record, "name": f"media/{n}"} for n in range(MAX_FINDINGS + 100)]
    (tiny_dataset / MANIFEST_NAME).write_text(json.dumps(document))
    assert len(verify(tiny_dataset, progress=False)) == MAX_FINDINGS
