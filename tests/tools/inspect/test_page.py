"""A row's page as a file: it holds the whole row, text of the dataset stays text, and it stays small."""

from __future__ import annotations

import base64
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from coldstill.storage_schema.header_facts import AdapterFacts, NamedIds
from coldstill.tools.errors import PageNotWritten, RowOutOfRange
from coldstill.tools.inspect import page as page_module
from coldstill.tools.inspect.page import page_data, script_safe, write_page
from coldstill.tools.inspect.row_facts import InspectedRow, open_row
from coldstill.tools.inspect.terminal import show_dataset
from tests import making
from tests.tools.inspect import strange_tokens
from tests.tools.inspect.strange_tokens import hidden_characters

DTYPES = {"Float32Array": "<f4", "Uint16Array": "<u2", "Uint32Array": "<u4"}


class Parts(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the content of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def unpacked(data: dict[str, Any], name: str) -> np.ndarray:
    packed = data[name]
    return np.frombuffer(base64.b64decode(packed["base64"]), DTYPES[packed["type"]])


def shares(data: dict[str, Any]) -> np.ndarray:
    """What each position's bars sum to."""
    owner = np.repeat(np.arange(unpacked(data, "listed").size), unpacked(data, "listed"))
    listed = np.bincount(owner, unpacked(data, "top_probs"), minlength=unpacked(data, "listed").size)
    return listed + unpacked(data, "rest") + unpacked(data, "tail")


@pytest.fixture
def one(tiny_dataset: Path) -> InspectedRow:
    return open_row(tiny_dataset, 5)


def test_the_data_are_the_facts_of_the_row(one: InspectedRow) -> None:
    data = json.loads(script_safe(page_data(one)))
    words, facts = np.array(data["words"]), one.facts
    assert words[unpacked(data, "token_words")].tolist() == [one.text.label(i) for i in one.row.token_ids.tolist()]
    pieces = [data["pieces"][place] for place in unpacked(data, "token_pieces")]
    assert pieces == one.text.pieces(one.row.token_ids.tolist())
    assert unpacked(data, "token_ids").tolist() == one.row.token_ids.tolist()
    assert unpacked(data, "positions").tolist() == facts.positions.tolist()
    for name, values in (("entropy", facts.entropy), ("surprise", facts.surprise), ("tail", facts.tail_mass)):
        np.testing.assert_allclose(unpacked(data, name), values, rtol=1e-6, atol=1e-9)
    assert unpacked(data, "rank").tolist() == facts.label_rank.tolist()
    top = [one.text.label(i) for i in facts.ids[facts.ids >= 0].tolist()]
    assert words[unpacked(data, "top_words")].tolist() == top
    np.testing.assert_allclose(shares(data), 1, atol=1e-5)


def test_draws_are_listed_with_their_multiplicity_and_probability(tmp_path: Path) -> None:
    root = strange_tokens.hostile_dataset(tmp_path / "dataset", tmp_path / "tokenizer")
    one = open_row(root, 0)
    data, targets = page_data(one), one.row.targets
    sizes = unpacked(data, "draw_listed")
    edges = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    assert targets.draw_logprobs is not None
    for n in range(targets.positions):
        mine = slice(targets.draw_offsets[n], targets.draw_offsets[n + 1])
        drawn = [one.text.label(i) for i in targets.draw_ids[mine].tolist()]
        listed = slice(edges[n], edges[n + 1])
        words = [data["words"][place] for place in unpacked(data, "draw_words")[listed]]
        times = unpacked(data, "draw_times")[listed].tolist()
        assert dict(zip(words, times, strict=True)) == {word: drawn.count(word) for word in drawn}
        assert times == sorted(times, reverse=True)
        logprobs = dict(zip(drawn, targets.draw_logprobs[mine].tolist(), strict=True))
        found = unpacked(data, "draw_probs")[listed]
        np.testing.assert_allclose(found, np.exp([logprobs[word] for word in words]), rtol=1e-5)


def test_what_does_not_fit_keeps_its_mass(one: InspectedRow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_LISTED", 3 * one.facts.labels.size)
    data = page_data(one)
    assert unpacked(data, "listed").max() == 3
    assert unpacked(data, "rest").max() > 0
    np.testing.assert_allclose(shares(data), 1, atol=1e-5)


def test_a_row_that_is_too_long_is_cut_with_a_notice(one: InspectedRow, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = int(one.facts.positions[2]) + 1
    monkeypatch.setattr(page_module, "MAX_TOKENS", cut)
    data = page_data(one)
    assert unpacked(data, "token_words").size == cut
    assert data["row"]["tokens"] == one.row.token_ids.size
    assert unpacked(data, "positions").tolist() == one.facts.positions[:2].tolist()
    np.testing.assert_allclose(shares(data), 1, atol=1e-5)


def test_a_hostile_row_makes_a_page_with_our_elements_only(tmp_path: Path, tiny_dataset: Path) -> None:
    root = strange_tokens.hostile_dataset(tmp_path / "dataset", tmp_path / "tokenizer")
    hostile = write_page(root, 0, tmp_path / "hostile.html").read_text(encoding="utf-8")
    harmless = write_page(tiny_dataset, 0, tmp_path / "harmless.html").read_text(encoding="utf-8")
    assert Parts(hostile).elements[2:] == Parts(harmless).elements[2:]
    assert len(Parts(hostile).scripts) == 2
    assert Parts(hostile).scripts[1] == Parts(harmless).scripts[1]
    assert hidden_characters(hostile) == set()
    data = json.loads(Parts(hostile).scripts[0])
    assert strange_tokens.SCRIPT in data["words"]
    assert hidden_characters("".join([*data["words"], *data["pieces"], data["row"]["metadata"]])) == set()


def test_the_page_names_no_place_to_load_from_and_forbids_loading(tiny_dataset: Path, tmp_path: Path) -> None:
    page = write_page(tiny_dataset, 0, tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\(|\bsrc=|\bhref=", re.sub(r'"base64":"[^"]*"', "", page))
    policies = [attrs["content"] for tag, attrs in Parts(page).elements if attrs.get("http-equiv")]
    assert len(policies) == 1
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policies[0]


def test_json_in_a_script_cannot_end_it() -> None:
    strange = ["</script>", "<!--", "]]>", "\u2028\u2029", "&lt;", "\ud800", "é"]
    text = script_safe(strange)
    assert json.loads(text) == strange
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_a_row_of_4096_tokens_at_k_64_takes_a_few_megabytes(tmp_path: Path) -> None:
    root = strange_tokens.long_dataset(tmp_path)
    page = write_page(root, 0, tmp_path / "page.html")
    assert page.stat().st_size < 4_000_000
    assert unpacked(page_data(open_row(root, 0)), "listed").min() == 64


def test_a_row_number_out_of_range_names_the_range(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RowOutOfRange, match="0 to 23"):
        write_page(tiny_dataset, 24, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_has_a_name(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(PageNotWritten):
            write_page(tiny_dataset, 0, path)


def test_the_page_names_the_adapter_and_how_many_ids_of_each_kind_are_kept(
    tiny_dataset: Path, one: InspectedRow, tmp_path: Path, tokenizer_folder: Path
) -> None:
    plain = page_data(one)["dataset"]
    assert (plain["teacher"], plain["kept"]) == ("tiny", "K = 8")
    header = one.dataset.header
    adapter = AdapterFacts(name="polite", weights_fingerprint="4" * 64)
    about = header.about.model_copy(update={"score_ids": NamedIds(column="ids", top_k=6, most=2)})
    changes = {"teacher": header.teacher.model_copy(update={"adapter": adapter}), "kept_ids": "top_k_and_named"}
    for number, (facts, kept) in enumerate(
        ((about, "K = 6 and at most 2 named ids"), (header.about, "at most 8 ids, named ones among them"))
    ):
        root = tmp_path / str(number)
        changed = header.model_copy(update={**changes, "about": facts})
        making.write_dataset(root, [making.random_rows(2)], header=changed, tokenizer=tokenizer_folder)
        shown = page_data(open_row(root, 0))["dataset"]
        assert (shown["teacher"], shown["kept"]) == ("tiny + adapter polite", kept)
        console = Console(record=True, width=200)
        show_dataset(root, console=console)
        assert "tiny + adapter polite" in console.export_text()
