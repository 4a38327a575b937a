"""Text of a dataset in Markdown: a real renderer shows it unchanged, and never as markup."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from coldstill.common.visible import MAX_SHOWN, plain, shortened, visible
from coldstill.tools.card.markdown import table

HOSTILE = [
    "<script>alert(1)</script>",
    "](javascript:alert(1)) ![x](https://a.example/x.png)",
    "`code` **bold** _it_ ~~no~~ # no | no | no",
    "a\n\n# b\n---\n<img src=x onerror=alert(1)>",
    "&lt;b&gt; &#60;b&#62;",
    "https://a.example www.a.example WWW.a.example a@b.example mailto:a@b.example",
    "\x1b[31m red \u202e txt \ud800",
    "$x$ :smile: @name #1 \\",
    "{{ x }} {% y %} ${z}",
]


def rendered(markdown: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)


def shown(text: str) -> str:
    return re.sub(r"\s+", " ", shortened(visible(text))) or "-"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(text: str) -> None:
    assert rendered(f"# x {plain(text)} x").strip() == f"<h1>x {html.escape(shown(text), quote=True)} x</h1>".replace(
        "&#x27;", "'"
    )


@given(st.text(st.characters(codec=None), max_size=60))
def test_any_text_in_a_cell_stays_in_its_cell(text: str) -> None:
    page = rendered(table(["a", "b"], [[plain(text), "end"]]))

    cells = re.findall(r"<td>(.*?)</td>", page, flags=re.S)
    assert [html.unescape(cell).replace("\xa0", " ") for cell in cells][1:] == ["end"]
    assert set(re.findall(r"</?(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td"}


@given(st.text(max_size=400))
def test_plain_text_holds_no_active_sign_and_is_not_long(text: str) -> None:
    shown = plain(text)

    assert not re.search(r"[<>`*_\[\]()!|\\:@$~\n\r]", shown)
    assert re.fullmatch(r"(?:&#\d+;|[^&#])*", shown)
    assert len(html.unescape(shown)) <= 11 * (MAX_SHOWN + 1)


def test_names_of_models_stay_readable() -> None:
    assert plain("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert plain("") == plain("  ") == "-"


def test_bare_addresses_are_no_links() -> None:
    assert "www." not in plain("www.a.example").lower()
    assert "http:" not in plain("http://a.example")


def test_tables_of_more_than_two_columns_have_numbers_at_the_right() -> None:
    assert table(["", "a", "b"], [["x", "1", "2"]]) == "|  | a | b |\n| --- | --: | --: |\n| x | 1 | 2 |"
