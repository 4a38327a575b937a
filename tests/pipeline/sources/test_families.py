"""Laws of loss masks over templates in the styles of well-known families: each chat is right, or refused by name."""

from __future__ import annotations

import random

import pytest

from coldstill.pipeline.errors import TemplateCannotMark
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.teachers.protocol import TokenSequence

from .families import real, table
from .families.chats import KINDS, Chats, Kind, cell, maker_of, outcome
from .families.styles import FAMILIES, Family

_IDS = [family.name for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES, ids=_IDS)
def test_targets_are_the_assistants_own_text_to_its_first_end_token_or_the_chat_is_refused(family: Family) -> None:
    """Random chats: no word of a user, of the system or of a tool, no part of the generation prompt, no second end."""
    maker = maker_of(family)
    for seed in range(6):
        for kind in KINDS:
            result, detail = outcome(maker, family, Chats(seed).row(kind))
            assert result != "wrong", (kind, seed, detail)


@pytest.mark.parametrize("family", FAMILIES, ids=_IDS)
@pytest.mark.parametrize("kind", ["one turn", "several turns", "list content"])
def test_every_family_captures_plain_chats_of_any_length(family: Family, kind: Kind) -> None:
    assert cell(family, kind, chats=3)[0] == "right"


@pytest.mark.parametrize("family", FAMILIES, ids=_IDS)
def test_the_last_turn_alone_is_the_last_run_of_all_turns(family: Family) -> None:
    row = SourceRow(0, Chats(5).row("several turns"))
    every, last = (maker_of(family, loss_on=loss_on).make(row) for loss_on in ("assistant", "last_turn"))
    assert isinstance(every, TokenSequence)
    assert isinstance(last, TokenSequence)
    assert last.target_spans.tolist() == every.target_spans.tolist()[-1:]


def test_every_way_out_of_a_refusal_that_is_a_setting_works() -> None:
    """With the settings of the page's notes, each of them as often as a chat needs."""
    checked = set()
    for family, kind, key in table.refusals():
        settings: dict[str, object] = {}
        while key in table.SETTINGS:
            checked.add(key)
            for name, value in table.SETTINGS[key].items():
                settings[name] = [*settings.get(name, []), *value] if isinstance(value, list) else value  # type: ignore[misc]
            made = maker_of(family, **settings).make(SourceRow(0, Chats(3).row(kind)))
            if isinstance(made, TokenSequence):
                break
            following = table.reason_of(f"{made.reason}: {made.detail}")
            assert following != key, (family.name, kind, made.detail)
            key = following
    assert checked == set(table.SETTINGS)


def test_the_page_of_chat_templates_is_up_to_date_and_no_cell_is_wrong() -> None:
    """`python -m tests.pipeline.sources.families.table` makes it."""
    styled = table.styled_part()
    assert "wrong" not in styled
    page = table.PAGE.read_text(encoding="utf-8")
    assert page.startswith(styled)
    assert table.REAL in page
    assert "wrong" not in page


@pytest.mark.real
@pytest.mark.skipif(not real.folders(), reason=f"{real.VARIABLE} names no folder with tokenizers")
def test_the_pages_part_over_real_tokenizers_is_up_to_date() -> None:
    assert table.PAGE.read_text(encoding="utf-8").endswith(table.real_part())


def test_the_opening_between_two_answers_in_a_row_is_no_target() -> None:
    """OLMo's prompt after an answer lacks the line end that the whole chat has there."""
    family = next(family for family in FAMILIES if family.name == "OLMo 2")
    maker = maker_of(family)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]
    made = maker.make(SourceRow(0, {"messages": messages}))
    assert isinstance(made, TokenSequence)
    runs = [maker.tokenizer.decode(made.token_ids[start + 1 : stop + 1]) for start, stop in made.target_spans]
    assert runs == ["one<|endoftext|>", "two<|endoftext|>"]


_STRANGE = (
    "",
    "yes",
    " yes",
    "yes ",
    "\nyes",
    "yes\n",
    "<think>",
    "</think>",
    "<think>x</think> yes",
    "<|im_end|>",
    "</s>",
)


@pytest.mark.parametrize("family", FAMILIES, ids=_IDS)
def test_no_run_of_targets_continues_after_an_end_token(family: Family) -> None:
    """Equal texts of user and assistant, empty ones, marks of the template as text: right, or refused by name."""
    maker, rng = maker_of(family), random.Random(7)
    ends, scored = set(maker.end_token_ids or ()), 0
    for _ in range(40):
        roles = ["user", "assistant"] * rng.randint(1, 3)
        messages = [
            {"role": role, "content": rng.choice(_STRANGE[1:] if role == "user" else _STRANGE)} for role in roles
        ]
        try:
            made = maker.make(SourceRow(0, {"messages": messages}))
        except TemplateCannotMark:
            continue
        if not isinstance(made, TokenSequence):
            assert made.reason in ("cannot_mark", "template_drops", "template_failed")
            continue
        assert len(made.target_spans) <= len(roles) // 2
        for start, stop in made.target_spans:
            run = made.token_ids[start + 1 : stop + 1].tolist()
            assert not ends.intersection(run[:-1])
            scored += 1
    assert scored >= 20
