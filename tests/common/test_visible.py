"""Laws of untrusted text made safe to display."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstill.common.visible import counted, visible
from tests.tools.inspect.strange_tokens import hidden_characters


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_becomes_visible_characters_and_spaces(text: str) -> None:
    shown = visible(text)
    assert hidden_characters(shown) == set()
    assert "\n" not in shown
    shown.encode()


@given(st.text(st.characters(categories=("L", "N", "P", "S", "M"))))
def test_text_that_can_be_seen_is_left_as_it_is(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        ("\x1b[31m", "␛[31m"),
        ("\x7f", "␡"),
        ("\x9b", "\\x9b"),
        ("\u202e", "\\u202e"),
        ("\u00a0", "\\xa0"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("a\tb\r\n", "a␉b␍⏎"),
    ],
)
def test_each_kind_of_hidden_character_has_its_form(hidden: str, shown: str) -> None:
    assert visible(hidden) == shown


def test_a_sign_that_looks_like_a_newline_stays_a_sign() -> None:
    assert visible("a⏎b\nc", newline="\n") == "a⏎b\nc"


def test_one_of_a_thing_is_no_plural() -> None:
    assert [counted(count, "shard") for count in (0, 1, 1000)] == ["0 shards", "1 shard", "1,000 shards"]
